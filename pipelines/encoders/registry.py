"""The encoder families by name: `family:reference`, as in `open_clip:ViT-B-32/laion2b_s34b_b79k`."""

from __future__ import annotations

from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any, cast

from pipelines.encoders.base import Encoder, EncoderSpec, Family, TextFamily, Tokenizer
from pipelines.errors import ConfigError
from pipelines.secrets import carries_credentials

if TYPE_CHECKING:
    import torch

FAMILIES = ("open_clip", "hf")
"""Each a module of this package; another, `<family>_text`, has its tokenizer, all that decode workers need of it."""


def describe(name: str, options: dict[str, dict[str, Any]] | None = None) -> EncoderSpec:
    """The spec of `family:reference`, without loading or downloading weights.

    options: file system options by protocol, for weights in object storage.
    Raises: ConfigError for a name of no known form; EncoderError for a model that cannot be had exactly.
    """
    family, colon, reference = name.partition(":")
    if family not in FAMILIES or not colon or not reference:
        known = ", ".join(f"{family}: (as in {_family(family).EXAMPLE})" for family in FAMILIES)
        raise ConfigError(f"encoder = {name}: no encoder of that form.", f"Known families: {known}.")
    if "?" in reference:
        raise ConfigError(f"encoder = {name}: takes no options.", f"Leave out ?{reference.partition('?')[2]}.")
    if carries_credentials(reference):
        raise ConfigError(f"encoder = {name}: a URL with credentials would be recorded.", "Put them into storage.")
    return _family(family).describe(name, reference, options or {})


def tokenizer(spec: EncoderSpec) -> Tokenizer:
    """Loads no weights; thread-safe use is one instance a thread."""
    return cast(TextFamily, _module(f"{spec.family}_text")).tokenizer(spec)


def load(spec: EncoderSpec, device: torch.device) -> Encoder:
    """The model with exactly `spec.weights`, in `spec.precision`, on `device`. Raises: EncoderError."""
    return _family(spec.family).load(spec, device)


def _family(name: str) -> Family:
    """Imported when first asked for: a machine needs the libraries of the families it uses, no others."""
    return cast(Family, _module(name))


def _module(name: str) -> ModuleType:
    return import_module(f"pipelines.encoders.{name}")
