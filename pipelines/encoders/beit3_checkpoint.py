"""Files of BEiT-3's weights: what they hold, and a model of it."""

from __future__ import annotations

import argparse
import zipfile
from math import isqrt
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional

from pipelines.encoders.multiway import EXTRA_POSITIONS, Retrieval, Shape
from pipelines.errors import EncoderError

State = dict[str, torch.Tensor]

_PATCHES = "beit3.vision_embed.proj.weight"
_TEXT, _IMAGE_POSITIONS, _TEXT_POSITIONS = (
    "beit3.text_embed.weight",
    "beit3.encoder.embed_positions.A.weight",
    "beit3.encoder.embed_positions.B.weight",
)
_HIDDEN = "beit3.encoder.layers.0.ffn.A.fc1.weight"
_HEADS = ("vision_head.weight", "language_head.weight")


def read(path: Path, device: str = "cpu") -> State:
    """The state of a file, under `model`, under `module` or bare; only mapped into memory.

    device: `meta` for shapes alone. Raises: EncoderError, of weights that are not those of a retrieval model too.
    """
    try:
        # What the original's training saves beside the weights: the arguments it was called with.
        with torch.serialization.safe_globals([argparse.Namespace]):
            file = torch.load(path, map_location=device, weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:
        raise EncoderError(f"{path} cannot be read: {error}", "Name a checkpoint that torch.save wrote.") from error
    state = next((file[key] for key in ("model", "module") if key in file), file) if isinstance(file, dict) else None
    if not isinstance(state, dict):
        raise EncoderError(f"{path} holds no weights.", "Name a checkpoint of BEiT-3.")
    _require_retrieval(state, path)
    return state


def _require_retrieval(state: State, path: Path) -> None:
    if lacking := [key for key in _HEADS if key not in state]:
        others = sorted({key.partition(".")[0] for key in state} - {"beit3"})
        raise EncoderError(
            f"{path} has no {' and no '.join(lacking)}, without which images and captions share no space"
            f" (besides the encoder, it has {', '.join(others) or 'nothing'}).",
            "Name a checkpoint of retrieval (beit3_*_retrieval.pth) or of beit3_*_itc_*.pth.",
        )


def shape_of(state: State, heads: int, path: Path) -> Shape:
    """heads: not to be seen in weights. Raises: EncoderError for weights of another model."""
    needed = (_PATCHES, _TEXT, _IMAGE_POSITIONS, _TEXT_POSITIONS, _HIDDEN)
    if lacking := [key for key in needed if key not in state]:
        raise EncoderError(f"{path} lacks {', '.join(lacking)}.", "Name a checkpoint of BEiT-3.")
    dim, _, patch, _ = state[_PATCHES].shape
    if dim % heads:
        raise EncoderError(f"{path}: {dim} dimensions are not divided by {heads} heads.", "Name its heads by ?heads=.")
    return Shape(
        dim=dim,
        heads=heads,
        layers=len({key.split(".")[3] for key in state if key.startswith("beit3.encoder.layers.")}),
        hidden=len(state[_HIDDEN]),
        vocabulary=len(state[_TEXT]),
        positions=len(state[_TEXT_POSITIONS]),
        patch=patch,
        side=_grid(state, path) * patch,
    )


def _grid(state: State, path: Path) -> int:
    patches = len(state[_IMAGE_POSITIONS]) - EXTRA_POSITIONS
    if patches < 1 or isqrt(patches) ** 2 != patches:
        raise EncoderError(f"{path}: {patches} positions of patches are no square.", "Name a checkpoint of BEiT-3.")
    return isqrt(patches)


def build(state: State, shape: Shape, dtype: torch.dtype, path: Path) -> Retrieval:
    """The model of exactly these weights, its image positions interpolated to the shape's side.

    Raises: EncoderError listing keys that are missing, unexpected or of another shape.
    """
    with torch.device("meta"):
        model = Retrieval(shape)
    resized = {**state, _IMAGE_POSITIONS: _interpolated(state, shape, path)}
    # Copied, as the file's pages are anyone's who writes to it.
    cast: dict[str, Any] = {key: value.to(dtype, copy=True) for key, value in resized.items()}
    try:
        model.load_state_dict(cast, strict=True, assign=True)
    except RuntimeError as error:
        raise EncoderError(f"{path}: the weights are not those of BEiT-3: {error}", "Repair the checkpoint.") from error
    return model


def _interpolated(state: State, shape: Shape, path: Path) -> torch.Tensor:
    """Bicubic, in fp32, as the original fine-tunes at other resolutions."""
    table, grid, wanted = state[_IMAGE_POSITIONS], _grid(state, path), shape.side // shape.patch
    if grid == wanted:
        return table
    patches = table[EXTRA_POSITIONS:].float().T.reshape(1, -1, grid, grid)
    resized = functional.interpolate(patches, size=(wanted, wanted), mode="bicubic", align_corners=False)
    return torch.cat((table[:EXTRA_POSITIONS].float(), resized[0].flatten(1).T))
