"""An encoder's vectors made shorter as its last step: by a fitted map, or by leaving out what comes last.

A map is a safetensors file of `mean` [raw dim] and `components` [raw dim, dim], float32, as `pipelines.fit` writes it:
(v - mean) @ components of a vector v of unit length.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from pipelines.contracts import Modality, VectorSpec
from pipelines.encoders import weights
from pipelines.encoders.base import Encoder, EncoderSpec
from pipelines.encoders.name import EncoderName
from pipelines.errors import ConfigError, EncoderError

DETAIL = "projection"
MATRYOSHKA = "matryoshka"


def reduced(spec: EncoderSpec, name: EncoderName) -> EncoderSpec:
    """The spec with the projection or truncation that its name asks for. Raises: ConfigError, EncoderError."""
    if {"projection", "dim"} <= name.options.keys():
        raise ConfigError(f"encoder = {name.text}: projection and dim exclude each other.", "Name one.")
    if "projection" in name.options:
        return _projected(spec, name.options["projection"])
    dim = name.integer("dim")
    return spec if dim is None else _truncated(spec, dim)


def _projected(spec: EncoderSpec, reference: str) -> EncoderSpec:
    path, digest = _fetched(reference, spec.options)
    with _opened(path, reference) as file:
        raw, dim = file.get_slice("components").get_shape()
    lengths = {vectors.dim for vectors in spec.vectors.values()}
    if lengths != {raw}:
        raise ConfigError(
            f"{reference} projects vectors of {raw} dimensions; {spec.name} gives {sorted(lengths)}",
            "Fit one for this encoder with `vecmill fit`.",
        )
    return _with_dim(spec, dim, {"sha256": digest, "reference": reference})


def _truncated(spec: EncoderSpec, dim: int) -> EncoderSpec:
    trained: list[int] = spec.details.get(MATRYOSHKA) or []
    if dim not in trained:
        known = f"It was trained for {', '.join(map(str, trained))}." if trained else "It was not trained for that."
        raise ConfigError(
            f"{spec.name}: dim={dim}: the first numbers of its vectors are no vectors of their own. {known}",
            "Fit a projection with `vecmill fit`, and name it with ?projection=FILE.",
        )
    return _with_dim(spec, dim, {"first": dim})


def _with_dim(spec: EncoderSpec, dim: int, how: dict[str, Any]) -> EncoderSpec:
    raw = {modality: vectors.dim for modality, vectors in spec.vectors.items()}
    shorter: dict[Modality, VectorSpec] = {
        modality: replace(vectors, dim=dim) for modality, vectors in spec.vectors.items()
    }
    return replace(spec, vectors=shorter, details={**spec.details, DETAIL: {**how, "raw": raw}})


def plain(spec: EncoderSpec) -> EncoderSpec:
    """The spec of the encoder that is projected."""
    raw = spec.details[DETAIL]["raw"]
    vectors: dict[Modality, VectorSpec] = {
        modality: replace(vectors, dim=raw[modality]) for modality, vectors in spec.vectors.items()
    }
    return replace(spec, vectors=vectors)


class Projected:
    """An encoder whose vectors are projected, in fp32, on its device."""

    def __init__(self, spec: EncoderSpec, inner: Encoder) -> None:
        self.spec, self.device, self.inner = spec, inner.device, inner
        how = spec.details[DETAIL]
        self._first: int | None = how.get("first")
        if self._first is None:
            self._mean, self._components = (each.to(self.device) for each in _load(how, spec.options))

    def collate(self, pixels: list[Any]) -> dict[str, torch.Tensor]:
        return self.inner.collate(pixels)

    def images(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        return self._project(self.inner.images(batch))

    def texts(self, tokens: torch.Tensor) -> torch.Tensor:
        return self._project(self.inner.texts(tokens))

    def pairs(self, batch: dict[str, torch.Tensor], tokens: torch.Tensor) -> torch.Tensor:
        return self._project(self.inner.pairs(batch, tokens))

    def _project(self, vectors: torch.Tensor) -> torch.Tensor:
        if self._first is not None:
            return vectors[..., : self._first]
        unit = torch.nn.functional.normalize(vectors.float(), dim=-1)
        return (unit - self._mean) @ self._components


def _load(how: dict[str, Any], options: dict[str, dict[str, Any]]) -> tuple[torch.Tensor, torch.Tensor]:
    path, digest = _fetched(how["reference"], options)
    if digest != how["sha256"]:
        raise EncoderError(f"{how['reference']} has changed since the run was planned.", "Put the old one back.")
    with _opened(path, how["reference"]) as file:
        return file.get_tensor("mean"), file.get_tensor("components")


def _fetched(reference: str, options: dict[str, dict[str, Any]]) -> tuple[Path, str]:
    parent, _, name = reference.rpartition("/")
    folder: weights.Folder
    if "://" in reference and not reference.startswith(("file://", "local://")):
        folder = weights.RemoteFolder(parent, options, only=name)
    else:
        folder = weights.LocalFolder(Path(reference.removeprefix("file://")).expanduser().absolute().parent)
    return folder.fetch([name]) / name, folder.digest([name])


def _opened(path: Path, reference: str) -> Any:
    try:
        file: Any = safe_open(path, "pt")
        if {"mean", "components"} <= set(file.keys()):
            return file
    except SafetensorError as error:
        raise EncoderError(f"{reference} is no projection: {error}", "Fit one with `vecmill fit`.") from None
    raise EncoderError(f"{reference} is no projection: it has no mean and components.", "Fit one with `vecmill fit`.")
