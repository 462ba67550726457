"""Batches of an encoder: host tensors from pixels, normalising and trimming on the device."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from pipelines.encoders.base import PADDING, ImageTransform

# Few distinct lengths, so that a GPU's kernels are chosen once for each.
_LENGTH_STEP = 8

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def stack(pixels: list[NDArray[np.uint8]]) -> dict[str, torch.Tensor]:
    """`pixels`: uint8 [n, height, width, 3] of images of one size."""
    return {"pixels": torch.from_numpy(np.stack(pixels))}


def padded(tokens: list[NDArray[np.int32]], longest: int) -> torch.Tensor:
    """int32 [n, length] of captions, shorter ones filled up with PADDING. longest: what length may not exceed."""
    length = max(map(len, tokens))
    if any(len(ids) != length for ids in tokens):
        length = min(-(-length // _LENGTH_STEP) * _LENGTH_STEP, longest)
    rows = np.full((len(tokens), length), PADDING, np.int32)
    for row, ids in zip(rows, tokens, strict=True):
        row[: len(ids)] = ids
    return torch.from_numpy(rows)


def patchify(pixels: list[NDArray[np.uint8]], transform: ImageTransform) -> dict[str, torch.Tensor]:
    """Images of differing sizes as padded runs of patches, as SigLIP2 NaFlex reads them.

    `pixels`: uint8 [n, max_patches, patch * patch * 3]; `mask`: int32 [n, max_patches], 1 where there
    is a patch; `grids`: int64 [n, 2], rows and columns of patches.
    """
    patch, most = transform.patch or 16, transform.max_patches or 256
    runs = np.zeros((len(pixels), most, patch * patch * 3), np.uint8)
    mask = np.zeros((len(pixels), most), np.int32)
    grids = np.array([(image.shape[0] // patch, image.shape[1] // patch) for image in pixels], np.int64)
    for at, (image, (rows, columns)) in enumerate(zip(pixels, grids, strict=True)):
        tiles = image.reshape(rows, patch, columns, patch, 3).transpose(0, 2, 1, 3, 4)
        runs[at, : rows * columns] = tiles.reshape(rows * columns, -1)
        mask[at, : rows * columns] = 1
    return {"pixels": torch.from_numpy(runs), "mask": torch.from_numpy(mask), "grids": torch.from_numpy(grids)}


class Normalize:
    """`(pixels / 255 - mean) / std` on the device: fp32 arithmetic, then the model's dtype."""

    def __init__(self, transform: ImageTransform, device: torch.device, dtype: torch.dtype) -> None:
        mean = torch.tensor(transform.mean, dtype=torch.float64)
        std = torch.tensor(transform.std, dtype=torch.float64)
        self._scale = (1 / (255 * std)).float().to(device)
        self._shift = (-mean / std).float().to(device)
        self._dtype = dtype

    def images(self, pixels: torch.Tensor) -> torch.Tensor:
        """[n, 3, height, width] from uint8 [n, height, width, 3], or 6, whole values and then their 256ths."""
        if pixels.shape[-1] == 6:
            pixels = pixels[..., :3] + pixels[..., 3:].float() / 256
        return self._last_axis(pixels).permute(0, 3, 1, 2)

    def patches(self, pixels: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """[n, patches, width] from uint8 of the same shape; zero where there is no patch."""
        values = self._last_axis(pixels.reshape(*pixels.shape[:-1], -1, 3)).flatten(-2)
        return values * mask.unsqueeze(-1).to(values.dtype)

    def _last_axis(self, pixels: torch.Tensor) -> torch.Tensor:
        return pixels.float().mul_(self._scale).add_(self._shift).to(self._dtype)


def trim(tokens: torch.Tensor, pooled: torch.Tensor) -> torch.Tensor:
    """`tokens` [n, length] cut behind the last position that is pooled from, int [n].

    Exact for a causal text tower: what follows a position does not reach it.
    """
    needed = int(pooled.max()) + 1
    return tokens[:, : -(-needed // _LENGTH_STEP) * _LENGTH_STEP]
