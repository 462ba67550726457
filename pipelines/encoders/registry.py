"""The encoder families by name: `family:reference`, as in `open_clip:ViT-B-32/laion2b_s34b_b79k`."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from importlib import import_module
from importlib.metadata import entry_points
from types import ModuleType
from typing import TYPE_CHECKING, Any, cast

from pipelines.encoders.base import Encoder, EncoderSpec, Family, TextFamily, Tokenizer
from pipelines.encoders.name import EncoderName
from pipelines.encoders.text_clean import CLEANERS
from pipelines.errors import ConfigError
from pipelines.secrets import carries_credentials

if TYPE_CHECKING:
    import torch

FAMILIES = ("open_clip", "hf", "timm", "blip", "blip2", "beit3", "st", "matcher")
"""Each a module of this package; another, `<family>_text`, has its tokenizer, all that decode workers need of it."""

DEMO = "demo"
"""The matcher that comes with the package, by its name alone."""

ENTRY_POINTS = "vecmill.encoders"
"""The group in which other packages name modules of theirs that are families."""

COMMON_OPTIONS = {
    "normalize": "true or false: whether vectors are made of unit length; true if left out",
    "projection": "a file of `vecmill fit`, a path or a URL: vectors are projected by PCA, whitened where it says so",
    "dim": "how many of a vector's first numbers are kept, for models that were trained for it (Matryoshka)",
}
_TRUTH = {"true": True, "false": False}


def describe(name: str, storage: dict[str, dict[str, Any]] | None = None) -> EncoderSpec:
    """The spec of `family:reference?option=value`, without loading or downloading weights.

    storage: file system options by protocol, for weights in object storage.
    Raises: ConfigError for a name of no known form; EncoderError for a model that cannot be had exactly.
    """
    parsed = EncoderName.parse(name)
    if parsed.family == DEMO and not parsed.reference:
        parsed = replace(parsed, family="matcher")
    elif parsed.family not in families() or not parsed.reference:
        known = ", ".join(f"{each}: (as in {family(each).EXAMPLES[0]})" for each in families())
        raise ConfigError(f"encoder = {name}: no encoder of that form.", f"Known families: {known}.")
    module = family(parsed.family)
    parsed.refuse_options({**module.OPTIONS, **COMMON_OPTIONS})
    if any(map(carries_credentials, (parsed.reference, *parsed.options.values()))):
        raise ConfigError(f"encoder = {name}: a URL with credentials would be recorded.", "Put them into storage.")
    spec = module.describe(parsed, storage or {})
    if not {"projection", "dim"}.isdisjoint(parsed.options):
        spec = _projection().reduced(spec, parsed)
    return replace(spec, normalize=_TRUTH[parsed.one_of("normalize", _TRUTH, str(spec.normalize).lower())])


def tokenizer(spec: EncoderSpec) -> Tokenizer:
    """Loads no weights; thread-safe use is one instance a thread."""
    tokenize = cast(TextFamily, _module(spec.family, "_text")).tokenizer(spec)
    if spec.text_clean == "none":
        return tokenize
    clean = CLEANERS[spec.text_clean]
    return lambda captions: tokenize([clean(caption) for caption in captions])


def load(spec: EncoderSpec, device: torch.device) -> Encoder:
    """The model with exactly `spec.weights`, in `spec.precision`, on `device`. Raises: EncoderError."""
    if "projection" not in spec.details:
        return family(spec.family).load(spec, device)
    projection = _projection()
    inner = family(spec.family).load(projection.plain(spec), device)
    return cast(Encoder, projection.Projected(spec, inner))


def _projection() -> ModuleType:
    """Imports torch, with which planning and decoding do without."""
    return import_module("pipelines.encoders.projection")


def families() -> tuple[str, ...]:
    """Of this package, then of others that are installed."""
    return (*FAMILIES, *(name for name in sorted(_others()) if name not in FAMILIES))


def family(name: str) -> Family:
    """Imported when first asked for: a machine needs the libraries of the families it uses, no others."""
    return cast(Family, _module(name))


def _module(family: str, suffix: str = "") -> ModuleType:
    """Of a family of another package, one module may have all."""
    if family in FAMILIES:
        return import_module(f"pipelines.encoders.{family}{suffix}")
    return import_module(_others()[family])


@cache
def _others() -> dict[str, str]:
    return {point.name: point.value for point in entry_points(group=ENTRY_POINTS)}
