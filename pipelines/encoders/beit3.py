"""BEiT-3 as fine-tuned for retrieval: `SIZE@FILE.pth`, SIZE base or large, FILE a path or a URL in object storage.

https://arxiv.org/abs/2208.10442; checkpoints and `beit3.spm`: https://github.com/microsoft/unilm/tree/master/beit3
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from typing import Any

import torch

from pipelines.contracts import VectorSpec
from pipelines.encoders import beit3_checkpoint, weights
from pipelines.encoders.base import EncoderSpec, ImageTransform
from pipelines.encoders.batch import DTYPES
from pipelines.encoders.beit3_source import Source, named, resolve
from pipelines.encoders.name import EncoderName
from pipelines.encoders.torch_encoder import TorchEncoder
from pipelines.errors import ConfigError, EncoderError

EXAMPLES = (
    "beit3:base@DIR/beit3_base_patch16_384_coco_retrieval.pth",
    "beit3:large@s3://models/beit3_large_patch16_384_f30k_retrieval.pth?size=384&spm=s3://models/beit3.spm",
)
OPTIONS = {
    "spm": "the sentencepiece model of its captions, a path or a URL; beit3.spm beside the checkpoint if left out",
    "size": "side of the image in pixels, as in 384; if left out, that of the checkpoint, on a disk",
    "heads": "how many heads of attention; if left out, 12 of a base and 16 of a large model",
}


@dataclass(frozen=True)
class _Size:
    dim: int
    heads: int


_SIZES = {"base": _Size(768, 12), "large": _Size(1024, 16)}
_PATCH, _CONTEXT = 16, 64


def describe(name: EncoderName, storage: dict[str, dict[str, Any]]) -> EncoderSpec:
    source = named(name, storage)
    if source.size not in _SIZES:
        raise ConfigError(f"encoder = {name.text}: {source.size} is no size.", f"Known: {', '.join(_SIZES)}.")
    heads = _positive(name, "heads") or _SIZES[source.size].heads
    dim, side = _dim_and_side(name, source, heads)
    vectors = VectorSpec(dim)
    return EncoderSpec(
        name=name.text,
        family="beit3",
        reference=source.reference,
        vectors={"image": vectors, "text": vectors},
        image=_transform(side),
        context_length=_CONTEXT,
        weights=source.checkpoint.folder.digest([source.checkpoint.name]),
        details={
            "heads": heads,
            "tokenizer": hashlib.sha256(source.vocabulary.fetched().read_bytes()).hexdigest(),
        },
        options=storage,
    )


def load(spec: EncoderSpec, device: torch.device) -> Beit3Encoder:
    assert spec.image is not None
    checkpoint = resolve(spec.reference, spec.options).checkpoint
    path = weights.fetch_verified(checkpoint.folder, [checkpoint.name], [checkpoint.name], spec.weights)
    state = beit3_checkpoint.read(path / checkpoint.name)
    shape = beit3_checkpoint.shape_of(state, spec.details["heads"], path / checkpoint.name)
    if shape.dim != spec.vectors["image"].dim:
        raise EncoderError(
            f"{spec.name}: the weights have {shape.dim} dimensions, not {spec.vectors['image'].dim}.",
            "Name the size of the checkpoint.",
        )
    shape = replace(shape, side=spec.image.size[0])
    return Beit3Encoder(
        spec, device, beit3_checkpoint.build(state, shape, DTYPES[spec.precision], path / checkpoint.name)
    )


class Beit3Encoder(TorchEncoder):
    def image(self, pixels: torch.Tensor) -> torch.Tensor:
        vectors: torch.Tensor = self.model.images(pixels)
        return vectors

    def text(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        vectors: torch.Tensor = self.model.texts(ids, mask)
        return vectors


def _dim_and_side(name: EncoderName, source: Source, heads: int) -> tuple[int, int]:
    """From the file where it lies on a disk, else from what the name says."""
    side, size = _positive(name, "size"), _SIZES[source.size]
    if side and side % _PATCH:
        raise ConfigError(f"encoder = {name.text}: size={side} is no multiple of {_PATCH}.", "As in ?size=384.")
    if not source.checkpoint.local:
        if side is None:
            raise ConfigError(
                f"encoder = {name.text}: the image size of a checkpoint in object storage is not known beforehand.",
                "Say it, as in ?size=384 for *_patch16_384_*.pth.",
            )
        return size.dim, side
    path = source.checkpoint.fetched()
    shape = beit3_checkpoint.shape_of(beit3_checkpoint.read(path, "meta"), heads, path)
    if "heads" not in name.options and shape.dim != size.dim:
        raise EncoderError(
            f"{path} has {shape.dim} dimensions; {source.size} has {size.dim}.", "Name its size, or its ?heads=."
        )
    return shape.dim, side or shape.side


def _positive(name: EncoderName, option: str) -> int | None:
    value = name.integer(option)
    if value is not None and value < 1:
        raise ConfigError(f"encoder = {name.text}: {option}={value} is not positive.")
    return value


def _transform(side: int) -> ImageTransform:
    return ImageTransform(
        resize="squash",
        size=(side, side),
        crop=None,
        resample="bicubic",
        alpha="drop",
        rgb="first",
        library="torchvision",
        mean=(0.5, 0.5, 0.5),
        std=(0.5, 0.5, 0.5),
    )
