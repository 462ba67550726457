"""What planning reads of a BLIP or BLIP-2 checkpoint: its architecture, its image size, its vocabulary."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers

from pipelines.encoders import weights
from pipelines.encoders.base import EncoderSpec, ImageTransform
from pipelines.encoders.batch import DTYPES
from pipelines.encoders.blip_captions import FILE_SUFFIXES, VOCABULARY, Storage, pinned_vocabulary
from pipelines.encoders.hf_images import image_transform
from pipelines.encoders.hf_text import from_files
from pipelines.encoders.hf_weights import checkpoint_files, load_strictly
from pipelines.encoders.light_tokenizer import kept_digest
from pipelines.encoders.name import EncoderName
from pipelines.errors import ConfigError, EncoderError

SHARED_OPTIONS = {
    "vocab": f"of a .pth: BERT's vocabulary, a vocab.txt, a tokenizer's folder or a hub name; {VOCABULARY} if left out",
    "image_size": "of a .pth: pixels a side, if other than it was trained on; its positions are interpolated",
}
# `<image>`, which the tokenizers of later BLIP-2 folders know in addition.
_IMAGE_TOKEN = 1
_OF_FILES = ("vocab", "image_size", "vision")


@dataclass(frozen=True)
class Source:
    """A checkpoint as far as planning reads it. cls: transformers' name of its class. details: for the spec."""

    reference: str
    cls: str
    config: Any
    image: ImageTransform
    weights: str
    details: dict[str, Any] = field(default_factory=dict, hash=False)


def is_file(name: EncoderName) -> bool:
    return name.reference.endswith(FILE_SUFFIXES)


@dataclass(frozen=True)
class SavedFolder:
    """A folder as transformers saves it, with its configuration read."""

    folder: weights.Folder
    path: Path
    config: Any
    cls: str


def saved_folder(name: EncoderName, storage: Storage, reasons: dict[str, str], known: tuple[str, ...]) -> SavedFolder:
    """reasons: why a class of transformers that is not `known` cannot serve. Raises: ConfigError, EncoderError."""
    if alien := [option for option in _OF_FILES if option in name.options]:
        raise ConfigError(f"encoder = {name.text}: {alien[0]}= is for .pth files.", "A folder says so itself.")
    folder = weights.folder(name.reference, storage)
    names = folder.names()
    if "config.json" not in names:
        raise EncoderError(f"{folder.reference} holds no config.json.", f"There: {', '.join(names) or 'nothing'}.")
    path = folder.fetch(weights.small(names))
    config = from_files(transformers.AutoConfig, path, folder.reference)
    saved = (getattr(config, "architectures", None) or [f"model of type {config.model_type}"])[0]
    if saved not in known:
        reason = reasons.get(saved, f"which {name.family}: does not embed")
        raise ConfigError(f"{folder.reference} is a {saved}, {reason}.", f"Use a {' or '.join(known)}.")
    return SavedFolder(folder, path, config, saved)


def folder_source(found: SavedFolder, checkpoint: list[str]) -> Source:
    """checkpoint: the weight files that are read. Raises: EncoderError."""
    reference, image = found.folder.reference, image_transform(found.path, found.folder.reference)
    if image.size != (size := _square(found.config.vision_config.image_size)):
        raise EncoderError(
            f"{reference}: its image processor makes images of {image.size}, its model takes {size}.",
            "Correct preprocessor_config.json.",
        )
    config = hashlib.sha256((found.path / "config.json").read_bytes()).hexdigest()
    details = {"model": found.cls, "config": config}
    return Source(reference, found.cls, found.config, image, found.folder.digest(checkpoint), details)


def _square(size: Any) -> tuple[int, int]:
    return (int(size), int(size)) if isinstance(size, int) else (int(size[0]), int(size[1]))


def file_reference(file: str, name: EncoderName, storage: Storage, **more: str) -> str:
    """Leads to the file, and to others named with it, from any node."""
    others = {"vocab": pinned_vocabulary(name.options.get("vocab", VOCABULARY), storage), **more}
    return f"{file}?{'&'.join(f'{key}={value}' for key, value in others.items())}"


def vocabulary(tokens: Any, words: int, added: int, name: str) -> dict[str, Any]:
    """Details of a vocabulary. words: of the model's embeddings; added: how many of them its tokenizer need not know.

    Raises: EncoderError where the two do not belong together.
    """
    if not words - added <= len(tokens) <= words + _IMAGE_TOKEN:
        raise EncoderError(
            f"{name}: the tokenizer has {len(tokens)} words, the model {words}.",
            "Use the vocabulary it was trained with.",
        )
    return {"tokenizer": kept_digest(tokens), "words": words}


def load_folder(cls: Any, spec: EncoderSpec) -> Any:
    """All weights of a folder, and no others. Raises: EncoderError."""
    folder = weights.folder(spec.reference, spec.options)
    checkpoint = checkpoint_files(folder)
    files = [*checkpoint, *weights.small(folder.names())]
    path = weights.fetch_verified(folder, files, checkpoint, spec.weights)
    return load_strictly(cls, path, DTYPES[spec.precision], spec.name)


def mean_over(hidden: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    """[n, dim] from [n, length, dim]; of the tokens alone, where a mask [n, length] says which they are."""
    if mask is None:
        return hidden.float().mean(1)
    share = mask.float() / mask.sum(1, keepdim=True)
    return (hidden.float() * share.unsqueeze(-1)).sum(1)
