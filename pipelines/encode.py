"""The encode actor: pixels and tokens in, vectors out. Loads its model once and keeps the device busy."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from numpy.typing import NDArray

from pipelines.config import EncodeConfig
from pipelines.contracts import Modality
from pipelines.encoders.base import Encoder, EncoderSpec
from pipelines.encoders.device import stages
from pipelines.encoders.items import Input, Vectors, captions, images, stored, with_vectors
from pipelines.encoders.registry import load, tokenizer
from pipelines.errors import EncoderError
from pipelines.observe import Observe, SharedClock, nowhere, peak_memory_mib
from pipelines.overlap import BatchSize, overlapped

NORM_TOLERANCE = 1e-2


class Encode:
    """PIXELS tables to `encoded_schema` tables, on one device.

    Vectors are L2-normalised in fp32 (where spec.normalize) and cast to spec.dtype. One that is not
    finite in half precision is computed again in fp32; still not finite, it becomes a Reject. End
    marks pass through. Two calls may run at once: they compute in turns, and one copies and
    collects while the other computes.

    settings: resolved, without "auto". device: as torch names it, `cuda:0` or `cpu`.
    Raises: EncoderError where the model cannot be loaded, gives vectors of the wrong shape or
    nothing finite, or has not enough memory for one item.
    """

    def __init__(
        self,
        spec: EncoderSpec,
        settings: EncodeConfig,
        modalities: Sequence[Modality],
        device: str,
        observe: Observe | None = None,
    ) -> None:
        if device == "cpu":
            torch.set_num_threads(int(settings.threads))
        # fp32 is fp32: with TF32, cuDNN's default, a patch embedding has the mantissa of fp16.
        torch.backends.cudnn.allow_tf32 = False
        self._spec, self._observe = spec, observe or nowhere
        encoder, limit, turn = load(spec, torch.device(device)), int(settings.batch_size), threading.Lock()
        self._towers = {modality: Tower(encoder, modality, limit, turn) for modality in modalities}
        self._checked: set[Modality] = set()
        self._counting, self._clock = threading.Lock(), SharedClock()
        self._counted = {"out_of_memory": 0, "recomputed": 0}
        for tower in self._towers.values():
            tower.warm_up()

    def __call__(self, table: pa.Table) -> pa.Table:
        with self._clock.running():
            encoded = {modality: self._encoded(table, modality) for modality in self._towers}
            result = with_vectors(table, encoded, self._spec)
        self._observe(
            stage="encode",
            rows=table.num_rows - pc.sum(table["end"], min_count=0).as_py(),
            items=sum(len(vectors.values) for vectors in encoded.values()),
            seconds=self._clock.take(),
            peak_mib=peak_memory_mib(),
            **self._new_counts(),
        )
        return result

    def _encoded(self, table: pa.Table, modality: Modality) -> Vectors:
        items = images(table) if modality == "image" else captions(table)
        vectors = Vectors(items, stored(self._towers[modality](items.inputs, items.name), self._spec))
        if modality not in self._checked and items.inputs:
            self._check(modality, vectors)
            self._checked.add(modality)
        return vectors

    def _check(self, modality: Modality, first: Vectors) -> None:
        finite = first.values[first.finite].astype(np.float32)
        if not len(finite):
            raise EncoderError(
                f"{self._spec.name}: none of the first {len(first.values)} {modality} vectors is finite",
                "Check the checkpoint, or store float32 (write.dtype).",
            )
        if self._spec.normalize and np.abs(np.linalg.norm(finite, axis=1) - 1).max() > NORM_TOLERANCE:
            raise EncoderError(f"{self._spec.name}: the first {modality} vectors are not of unit norm")

    def batch_size(self, modality: Modality) -> int:
        """Items in a batch now: fewer than was set, after memory ran out."""
        return self._towers[modality].size.now

    def _new_counts(self) -> dict[str, int]:
        """What was counted since it was last asked for, the warm-up included."""
        with self._counting:
            towers = self._towers.values()
            now = {
                "out_of_memory": sum(tower.out_of_memory for tower in towers),
                "recomputed": sum(tower.recomputed for tower in towers),
            }
            new = {name: now[name] - self._counted[name] for name in now}
            self._counted = now
        return new


class Tower:
    """One tower of a loaded encoder, fed in overlapped batches.

    turn: who may compute. size: of a batch. recomputed: items computed again in fp32 so far.
    """

    def __init__(self, encoder: Encoder, modality: Modality, limit: int, turn: threading.Lock) -> None:
        self._encoder, self._modality, self._turn = encoder, modality, turn
        self.size, self._stages = BatchSize(limit), stages(encoder, modality, turn)
        self._in_fp32: Tower | None = None
        self._loading = threading.Lock()
        self.recomputed = 0

    def __call__(self, inputs: Sequence[Input], name: Callable[[int], str]) -> NDArray[np.float32]:
        """Raw float32 [n, dim] of uint8 [height, width, 3] images or int32 [context_length] captions."""
        raw = self._once(inputs, name)
        overflowed = np.flatnonzero(~np.isfinite(raw).all(axis=1))
        if len(overflowed) and self._encoder.spec.precision != "fp32":
            again = [inputs[i] for i in overflowed]
            raw[overflowed] = self._exact()._once(again, lambda i: name(int(overflowed[i])))
            self.recomputed += len(overflowed)
        return raw

    def _once(self, inputs: Sequence[Input], name: Callable[[int], str]) -> NDArray[np.float32]:
        raw = np.empty((len(inputs), self._encoder.spec.dim), np.float32)
        if inputs:
            order = longest_first(inputs) if self._modality == "text" else np.arange(len(inputs))
            in_order = [inputs[i] for i in order]
            raw[order] = overlapped(in_order, self.size, self._stages, lambda i: name(int(order[i])))
        return raw

    def warm_up(self) -> None:
        """One full batch of the largest items: allocates what it needs, and finds out whether it fits."""
        sample = noise(self._encoder.spec) if self._modality == "image" else longest_caption(self._encoder.spec)
        overlapped([sample] * self.size.limit, self.size, self._stages)

    @property
    def out_of_memory(self) -> int:
        return self.size.out_of_memory + (self._in_fp32.out_of_memory if self._in_fp32 else 0)

    def _exact(self) -> Tower:
        with self._loading:
            if self._in_fp32 is None:
                self._in_fp32 = Tower(self._encoder.float(), self._modality, self.size.limit, self._turn)
            return self._in_fp32


def longest_first(captions: Sequence[Input]) -> NDArray[np.intp]:
    """Positions by falling length, for encoders that trim a batch's padding to its longest caption.

    A caption's padding is taken to be whatever its last token is; being wrong costs time, not exactness.
    """
    tokens = np.stack(captions)
    return np.argsort(-(tokens != tokens[:, -1:]).sum(axis=1), kind="stable")


def noise(spec: EncoderSpec) -> Input:
    """An image of the encoder's size."""
    assert spec.image is not None
    shape = (*(spec.image.crop or spec.image.size), 3)
    return np.random.default_rng(0).integers(0, 256, shape, np.uint8)


def longest_caption(spec: EncoderSpec) -> Input:
    """Tokens of a caption that is cut to the context length."""
    tokens: Input = tokenizer(spec)(["word " * spec.context_length])[0]
    return tokens
