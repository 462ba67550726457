"""What most encoders share: how batches become a model's inputs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from pipelines.encoders.base import EncoderSpec
from pipelines.encoders.batch import DTYPES, Normalize, stack


class TorchEncoder:
    """A model on one device, in eval mode, its parameters in the dtype of spec.precision.

    A family defines those of these that its modalities need, each giving [n, dim] or [n, count, dim]:
    image: of normalised pixels [n, 3, height, width].
    text: of int64 ids and mask [n, length], 1 where there is a token.
    pair: of images with their captions: pixels, ids and mask as above.
    """

    image: Callable[[torch.Tensor], torch.Tensor]
    text: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
    pair: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]

    def __init__(self, spec: EncoderSpec, device: torch.device, model: Any) -> None:
        self.spec, self.device = spec, device
        self.model = model.to(device).eval().requires_grad_(False)
        self._normalize = Normalize(spec.image, device, DTYPES[spec.precision]) if spec.image else None

    def collate(self, pixels: list[NDArray[np.uint8]]) -> dict[str, torch.Tensor]:
        return stack(pixels)

    def images(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        return self.image(self._pixels(batch))

    def texts(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.text(*masked(tokens))

    def pairs(self, batch: dict[str, torch.Tensor], tokens: torch.Tensor) -> torch.Tensor:
        return self.pair(self._pixels(batch), *masked(tokens))

    def _pixels(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        assert self._normalize is not None
        return self._normalize.images(batch["pixels"])


def masked(tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """ids, with 0 in place of padding, and mask, from tokens padded with PADDING."""
    mask = tokens >= 0
    return tokens.clamp(min=0).long(), mask.long()
