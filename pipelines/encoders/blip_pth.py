"""Checkpoints as BLIP's and LAVIS's own training code saved them: `torch.save({"model": …}, FILE.pth)`.

Shapes are read without reading the tensors, so that planning neither downloads nor loads them. The files are
https://github.com/salesforce/BLIP's and https://github.com/salesforce/LAVIS's.
"""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from pipelines.encoders import weights
from pipelines.encoders.base import EncoderSpec, ImageTransform
from pipelines.encoders.batch import DTYPES
from pipelines.encoders.blip_captions import Storage
from pipelines.encoders.hf_weights import load_strictly
from pipelines.encoders.name import EncoderName
from pipelines.errors import ConfigError, EncoderError
from pipelines.storage import Store

State = dict[str, torch.Tensor]
Rules = Sequence[tuple[str, str]]

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
POSITIONS = "vision_model.embeddings.position_embedding"
VIT_RULES: Rules = (
    (r"^visual_encoder\.norm\.", "vision_model.post_layernorm."),
    (r"^visual_encoder\.cls_token$", "vision_model.embeddings.class_embedding"),
    (r"^visual_encoder\.pos_embed$", POSITIONS),
    (r"^visual_encoder\.patch_embed\.proj\.", "vision_model.embeddings.patch_embedding."),
    (r"^visual_encoder\.blocks\.(\d+)\.norm([12])\.", r"vision_model.encoder.layers.\1.layer_norm\2."),
    (r"^visual_encoder\.blocks\.(\d+)\.attn\.proj\.", r"vision_model.encoder.layers.\1.self_attn.projection."),
    (r"^visual_encoder\.blocks\.(\d+)\.attn\.", r"vision_model.encoder.layers.\1.self_attn."),
    (r"^visual_encoder\.blocks\.", "vision_model.encoder.layers."),
)
"""From timm's names, as the original code has them, to transformers'."""


@dataclass(frozen=True)
class Pth:
    """One file of weights, wherever it lies."""

    folder: weights.Folder
    name: str
    storage: Storage = field(hash=False)

    @property
    def reference(self) -> str:
        return f"{self.folder.reference}/{self.name}"

    @property
    def digest(self) -> str:
        return self.folder.digest([self.name])

    def shapes(self) -> State:
        """The tensors without their values. Raises: EncoderError."""
        if isinstance(self.folder, weights.LocalFolder):
            return _tensors(self.folder.path / self.name, map_location="meta")
        with Store(options=self.storage).open(self.reference) as source:
            return _tensors(source, map_location="meta", told=self.reference)

    def state(self, digest: str) -> State:
        """The tensors, read from the disk as they are used. Raises: EncoderError where they are not `digest`'s."""
        path = weights.fetch_verified(self.folder, [self.name], [self.name], digest) / self.name
        return _tensors(path, map_location="cpu", mmap=True)


def pth(reference: str, storage: Storage) -> Pth:
    """Raises: EncoderError where there is no such file."""
    return Pth(*weights.containing(reference, storage), storage)


def _tensors(source: Any, told: str = "", **how: Any) -> State:
    """told: for messages."""
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            saved = torch.load(source, weights_only=True, **how)
    except Exception as error:
        raise EncoderError(
            f"{told or source}: cannot be read: {error}",
            'If it is whole, save its tensors alone, where you trust it: torch.save({"model": state}, FILE).',
        ) from error
    state = saved.get("model", saved) if isinstance(saved, dict) else {}
    return {key: value for key, value in state.items() if torch.is_tensor(value)}


def parsed(spec: EncoderSpec) -> EncoderName:
    """A spec's reference taken apart: the file, and the other files that are named with it."""
    return EncoderName.parse(f"{spec.family}:{spec.reference}")


# -- from the file's names to transformers' ------------------------------------------------------


def renamed(state: State, rules: Rules, dropped: str) -> State:
    """Each key by the first rule that fits it; those that match `dropped` are left out."""
    return {_renamed(key, rules): value for key, value in state.items() if not re.search(dropped, key)}


def _renamed(key: str, rules: Rules) -> str:
    for pattern, name in rules:
        if re.search(pattern, key):
            return re.sub(pattern, name, key)
    return key


def shape(state: State, key: str, name: str) -> torch.Size:
    """Raises: EncoderError where the file does not hold the key."""
    if key not in state:
        raise EncoderError(
            f"{name} holds no {key}: it is no checkpoint for retrieval.",
            "One for captions or questions has no space that images and text share; use a retrieval or pretrained one.",
        )
    return state[key].shape


def count(state: State, prefix: str) -> int:
    """How many layers there are below a prefix."""
    found = {int(match[1]) for key in state if (match := re.match(rf"{re.escape(prefix)}\.(\d+)\.", key))}
    return max(found, default=-1) + 1


def side_of(positions: torch.Size) -> int:
    """Patches along a side, from the shape [1 +] [class and patches, width] of a table of positions."""
    return math.isqrt(positions[-2] - 1)


def image_size(name: EncoderName, trained: int, patch: int) -> int:
    """What the name asks for, or what the weights were trained on. Raises: ConfigError."""
    size = name.integer("image_size", trained) or 0
    if size < patch or size % patch:
        raise ConfigError(f"encoder = {name.text}: image_size={size} is no multiple of its patches' {patch} pixels.")
    return size


def resized(table: torch.Tensor, side: int, align_corners: bool) -> torch.Tensor:
    """A table of positions, class first, for `side` x `side` patches: interpolated bicubically, as LAVIS does."""
    if side_of(table.shape) == side:
        return table
    first, patches, old = table[..., :1, :].float(), table[..., 1:, :].float(), side_of(table.shape)
    grid = patches.reshape(1, old, old, -1).permute(0, 3, 1, 2)
    grid = torch.nn.functional.interpolate(grid, (side, side), mode="bicubic", align_corners=align_corners)
    return torch.cat([first, grid.permute(0, 2, 3, 1).reshape(*first.shape[:-2], side * side, -1)], -2)


def transform(size: int) -> ImageTransform:
    """Of the original evaluation code: transparency dropped, squashed bicubically, OpenAI's mean and deviation."""
    return ImageTransform("squash", (size, size), None, "bicubic", "drop", "first", "torchvision", MEAN, STD)


# -- loading -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Given:
    """A class of transformers with its weights at hand, as `load_strictly` takes a class and a folder."""

    cls: Any
    config: Any
    state: State

    @property
    def __name__(self) -> str:
        return str(self.cls.__name__)

    def from_pretrained(self, _: Path, **how: Any) -> Any:
        return self.cls.from_pretrained(None, config=self.config, state_dict=self.state, **how)


def filled(cls: Any, config: Any, state: State, spec: EncoderSpec) -> Any:
    """A model with exactly these weights, in spec.precision. Raises: EncoderError."""
    return load_strictly(_Given(cls, config, state), Path(), DTYPES[spec.precision], spec.name)
