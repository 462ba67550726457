"""An encoder's vectors made shorter as its last step: by a fitted map, or by leaving out what comes last.

A map is a safetensors file of `mean` [raw dim] and `components` [raw dim, dim], float32, as `pipelines.fit` writes it:
(v - mean) @ components of a vector v of unit length.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from pipelines.contracts import Modality
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
    folder, file_name = weights.containing(reference, spec.options)
    path = folder.fetch([file_name]) / file_name
    with _opened(path, reference) as file:
        raw, dim = file.get_slice("components").get_shape()
        fitted_to = (file.metadata() or {}).get("modalities", "").split(",")
    modalities = [modality for modality in spec.modalities if modality in fitted_to]
    lengths = {spec.vectors[modality].dim for modality in modalities}
    if lengths != {raw}:
        raise ConfigError(
            f"{reference} projects {' and '.join(fitted_to)} vectors of {raw} dimensions, which {spec.name} does not "
            "give",
            "Fit one to what this encoder has embedded with `vecmill fit`.",
        )
    shorter = _with_dim(spec, dim, modalities, {"sha256": folder.digest([file_name])})
    return replace(shorter, projection=f"{folder.reference}/{file_name}")


def _truncated(spec: EncoderSpec, dim: int) -> EncoderSpec:
    trained: list[int] = spec.details.get(MATRYOSHKA) or []
    if dim not in trained:
        known = f"It was trained for {', '.join(map(str, trained))}." if trained else "It was not trained for that."
        raise ConfigError(
            f"{spec.name}: dim={dim}: the first numbers of its vectors are no vectors of their own. {known}",
            "Fit a projection with `vecmill fit`, and name it with ?projection=FILE.",
        )
    return _with_dim(spec, dim, spec.modalities, {"first": dim})


def _with_dim(spec: EncoderSpec, dim: int, modalities: Sequence[Modality], how: dict[str, Any]) -> EncoderSpec:
    raw = {modality: spec.vectors[modality].dim for modality in modalities}
    shorter = {modality: replace(spec.vectors[modality], dim=dim) for modality in modalities}
    return replace(spec, vectors={**spec.vectors, **shorter}, details={**spec.details, DETAIL: {**how, "raw": raw}})


def plain(spec: EncoderSpec) -> EncoderSpec:
    """The spec of the encoder that is projected."""
    raw: dict[Modality, int] = spec.details[DETAIL]["raw"]
    longer = {modality: replace(spec.vectors[modality], dim=dim) for modality, dim in raw.items()}
    return replace(spec, vectors={**spec.vectors, **longer})


class Projected:
    """An encoder whose vectors are projected, in fp32, on its device."""

    def __init__(self, spec: EncoderSpec, inner: Encoder) -> None:
        self.spec, self.device, self.inner = spec, inner.device, inner
        how = spec.details[DETAIL]
        self._first: int | None = how.get("first")
        self._modalities = how["raw"].keys()
        if self._first is None:
            self._mean, self._components = (each.to(self.device) for each in _load(spec))

    def collate(self, pixels: list[Any]) -> dict[str, torch.Tensor]:
        return self.inner.collate(pixels)

    def images(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        return self._project("image", self.inner.images(batch))

    def texts(self, tokens: torch.Tensor) -> torch.Tensor:
        return self._project("text", self.inner.texts(tokens))

    def pairs(self, batch: dict[str, torch.Tensor], tokens: torch.Tensor) -> torch.Tensor:
        return self._project("multimodal", self.inner.pairs(batch, tokens))

    def _project(self, modality: Modality, vectors: torch.Tensor) -> torch.Tensor:
        if modality not in self._modalities:
            return vectors
        if self._first is not None:
            return vectors[..., : self._first]
        unit = torch.nn.functional.normalize(vectors.float(), dim=-1)
        return (unit - self._mean) @ self._components


def _load(spec: EncoderSpec) -> tuple[torch.Tensor, torch.Tensor]:
    assert spec.projection
    path, digest = _fetched(spec.projection, spec.options)
    if digest != spec.details[DETAIL]["sha256"]:
        raise EncoderError(f"{spec.projection} has changed since the run was planned.", "Put the old one back.")
    with _opened(path, spec.projection) as file:
        return file.get_tensor("mean"), file.get_tensor("components")


def _fetched(reference: str, options: dict[str, dict[str, Any]]) -> tuple[Path, str]:
    folder, name = weights.containing(reference, options)
    return folder.fetch([name]) / name, folder.digest([name])


def _opened(path: Path, reference: str) -> Any:
    try:
        file: Any = safe_open(path, "pt")
        if {"mean", "components"} <= set(file.keys()):
            return file
    except SafetensorError as error:
        raise EncoderError(f"{reference} is no projection: {error}", "Fit one with `vecmill fit`.") from None
    raise EncoderError(f"{reference} is no projection: it has no mean and components.", "Fit one with `vecmill fit`.")
