"""A matcher's folder: `config.json`, `model.safetensors`, `vocab.txt`. What it says, without its weights."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from pipelines.encoders import weights
from pipelines.errors import EncoderError

CONFIG, WEIGHTS = "config.json", "model.safetensors"
VOCABULARY = "vocab.txt"
PAD, UNKNOWN = "<pad>", "<unk>"
START, END = "<start>", "<end>"
SHIPPED = "demo"
"""What leads any node to its own package's matcher: the name of its folder, here."""


def folder_of(reference: str, options: dict[str, dict[str, Any]]) -> weights.Folder:
    """Of a spec's reference. Raises: EncoderError, ConfigError."""
    return (
        weights.LocalFolder(Path(__file__).parent / SHIPPED)
        if reference == SHIPPED
        else weights.folder(reference, options)
    )


@dataclass(frozen=True)
class MatcherConfig:
    """What a matcher is built with.

    image_tower: a timm name. image_arguments: of `timm.create_model`. embed_dim: of the common space. lstm_hidden: of
    each direction. max_words: a caption's words beyond them are left out. vocab: the vocabulary's file. image_size:
    (height, width), to which images are squashed. mean, std: of the channels of images in [0, 1]. num_classes:
    identities that it was trained to tell apart.
    """

    image_tower: str
    embed_dim: int
    lstm_hidden: int
    word_dim: int
    max_words: int
    image_size: tuple[int, int]
    mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    std: tuple[float, float, float] = (0.5, 0.5, 0.5)
    num_classes: int = 0
    vocab: str = VOCABULARY
    image_arguments: dict[str, Any] = field(default_factory=dict, hash=False)

    def json(self) -> str:
        return json.dumps(asdict(self), indent=2) + "\n"


def read_config(path: Path, reference: str) -> MatcherConfig:
    """Of a fetched folder. Raises: EncoderError naming what is missing, unknown or of the wrong kind."""
    try:
        values = json.loads((path / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise EncoderError(f"{reference}/{CONFIG} cannot be read: {error}", _FORMAT) from None
    if not isinstance(values, dict):
        raise EncoderError(f"{reference}/{CONFIG} holds no object.", _FORMAT)
    known = {each.name for each in fields(MatcherConfig)}
    if unknown := sorted(values.keys() - known):
        raise EncoderError(f"{reference}/{CONFIG}: {unknown[0]} is not known.", f"Known: {', '.join(sorted(known))}.")
    try:
        return MatcherConfig(**{**values, **_tuples(values)})
    except (TypeError, ValueError) as error:
        raise EncoderError(f"{reference}/{CONFIG}: {error}", _FORMAT) from None


_FORMAT = "A folder that `vecmill train` made is expected, with config.json, model.safetensors and vocab.txt."


def _tuples(values: dict[str, Any]) -> dict[str, Any]:
    """A size may be one number; what JSON has as lists. Whole numbers are checked here, for a model of any other kind
    fails in ways that tell nothing."""
    size = values.get("image_size")
    if isinstance(size, int):
        size = (size, size)
    for name in ("embed_dim", "lstm_hidden", "word_dim", "max_words"):
        if not isinstance(values.get(name), int) or values[name] < 1:
            raise ValueError(f"{name} = {values.get(name)!r} is no whole number above 0")
    if not isinstance(size, list | tuple) or len(size) != 2 or not all(isinstance(side, int) for side in size):
        raise ValueError(f"image_size = {values.get('image_size')!r} is no height and width")
    sizes: dict[str, Any] = {"image_size": tuple(size)}
    return sizes | {name: tuple(map(float, values[name])) for name in ("mean", "std") if name in values}


def read_vocabulary(path: Path, reference: str) -> list[str]:
    """Words by id. Raises: EncoderError where the first two are not padding and the unknown word, or one is twice."""
    try:
        words = path.read_text(encoding="utf-8").removesuffix("\n").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise EncoderError(f"{reference}/{path.name} cannot be read: {error}", _FORMAT) from None
    if words[:2] != [PAD, UNKNOWN]:
        raise EncoderError(f"{reference}/{path.name} does not begin with {PAD} and {UNKNOWN}.", _FORMAT)
    if len(set(words)) != len(words):
        raise EncoderError(f"{reference}/{path.name} has a word twice.", "Every word has one line, its id.")
    return words
