"""What happens to a batch on a device: copied there, computed, its vectors collected."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from pipelines.contracts import Modality
from pipelines.encoders.base import Encoder
from pipelines.encoders.batch import padded
from pipelines.encoders.items import Input
from pipelines.errors import EncoderError


def stages(encoder: Encoder, modality: Modality, turn: threading.Lock) -> OnCpu:
    """The stages of one tower on the device its encoder is on. turn: who may compute."""
    return (OnCuda if encoder.device.type == "cuda" else OnCpu)(encoder, modality, turn)


class OnCpu:
    """Stages without copies or threads of their own."""

    threaded = False

    def __init__(self, encoder: Encoder, modality: Modality, turn: threading.Lock) -> None:
        self.encoder, self.modality, self.turn = encoder, modality, turn

    def copy(self, batch: Sequence[Input]) -> Any:
        return self.collate(batch)

    def compute(self, copied: Any) -> Any:
        with self.turn:
            return self.forward(copied)

    def collect(self, computed: Any) -> list[NDArray[np.float32]]:
        return list(np.asarray(computed))

    def collate(self, batch: Sequence[Input]) -> dict[str, torch.Tensor]:
        longest = self.encoder.spec.context_length
        if self.modality == "image":
            return self.encoder.collate(list(batch))
        if self.modality == "text":
            return {"tokens": padded(list(batch), longest)}
        pixels, tokens = zip(*batch, strict=True)
        return {**self.encoder.collate(list(pixels)), "tokens": padded(list(tokens), longest)}

    def forward(self, tensors: dict[str, torch.Tensor]) -> torch.Tensor:
        """float32 [n, count * dim]. Raises: EncoderError where the model gives another shape."""
        n, spec = len(next(iter(tensors.values()))), self.encoder.spec.vectors[self.modality]
        with torch.inference_mode():
            vectors = self._vectors(dict(tensors)).float()
        expected = (n, spec.dim) if spec.count == 1 else (n, spec.count, spec.dim)
        if vectors.shape != expected:
            found = tuple(vectors.shape)
            raise EncoderError(f"{self.encoder.spec.name}: {n} items gave vectors of shape {found}, not {expected}")
        return vectors.reshape(n, -1)

    def _vectors(self, tensors: dict[str, torch.Tensor]) -> torch.Tensor:
        if self.modality == "image":
            return self.encoder.images(tensors)
        tokens = tensors.pop("tokens")
        return self.encoder.texts(tokens) if self.modality == "text" else self.encoder.pairs(tensors, tokens)

    def is_out_of_memory(self, error: BaseException) -> bool:
        # Besides the allocator's own error: pinned memory, cuBLAS and the CPU's allocator word theirs otherwise.
        told = str(error).lower() if isinstance(error, RuntimeError) else ""
        return (
            isinstance(error, (torch.OutOfMemoryError, MemoryError))
            or "out of memory" in told
            or "cublas_status_alloc_failed" in told
            or "can't allocate memory" in told
        )

    def release(self) -> None:
        gc.collect()


class OnCuda(OnCpu):
    """Copies both ways on streams of their own, through pinned memory.

    Events order the streams, and `record_stream` keeps a tensor's memory until the other stream is
    done with it: https://docs.pytorch.org/docs/stable/notes/cuda.html#cuda-streams
    """

    threaded = True

    def __init__(self, encoder: Encoder, modality: Modality, turn: threading.Lock) -> None:
        super().__init__(encoder, modality, turn)
        self._device = encoder.device
        new_stream: Callable[..., torch.cuda.Stream] = torch.cuda.Stream
        self._inward, self._outward = new_stream(self._device), new_stream(self._device)

    def copy(self, batch: Sequence[Input]) -> Any:
        pinned = {name: tensor.pin_memory() for name, tensor in self.collate(batch).items()}
        with torch.cuda.stream(self._inward):
            tensors = {name: tensor.to(self._device, non_blocking=True) for name, tensor in pinned.items()}
            return tensors, self._inward.record_event()

    def compute(self, copied: Any) -> Any:
        tensors, arrived = copied
        with self.turn:
            stream = torch.cuda.current_stream(self._device)
            stream.wait_event(arrived)
            for tensor in tensors.values():
                tensor.record_stream(stream)
            return self.forward(tensors), stream.record_event()

    def collect(self, computed: Any) -> list[NDArray[np.float32]]:
        vectors, ready = computed
        self._outward.wait_event(ready)
        with torch.cuda.stream(self._outward):
            host = torch.empty(vectors.shape, dtype=vectors.dtype, pin_memory=True)
            host.copy_(vectors, non_blocking=True)
            vectors.record_stream(self._outward)
            self._outward.record_event().synchronize()
        return list(host.numpy())

    def release(self) -> None:
        gc.collect()
        torch.cuda.empty_cache()
