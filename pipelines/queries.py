"""Queries as vectors: texts and images through the encoder that made an output."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import inf
from os import cpu_count
from typing import Annotated, Any

import numpy as np
import pyarrow as pa
from pydantic import ConfigDict, Field

from pipelines.config import DecodeConfig, EncodeConfig
from pipelines.contracts import MODALITIES, SAMPLE, Modality, VectorSpec
from pipelines.decode import decode_batch
from pipelines.encode import Encode
from pipelines.encoders import registry
from pipelines.encoders.base import EncoderSpec, Target
from pipelines.errors import ConfigError, InputError
from pipelines.index.parts import Vectors, unit
from pipelines.record import read_record, require_same
from pipelines.storage import Store

_NOTHING = 1e-6


def query_spec(store: Store, encoder: str) -> EncoderSpec:
    """The encoder that made embeddings/<encoder>, found again by its name.

    Raises: PreflightError with the differences where what now bears the name is another.
    """
    recorded = read_record(store).encoders[encoder]
    made_by = recorded.encoder_spec(store.options)
    found = registry.describe(made_by.name, store.options)
    if found.image and made_by.image:
        found = replace(found, image=replace(found.image, alpha=made_by.image.alpha))
    resolved = {
        name: getattr(made_by, name) for name in ("precision", "normalize", "dtype", "max_aspect", "text_clean")
    }
    if "translation" in made_by.details:
        # What was searched was translated into the encoder's language, in which the queries are.
        resolved["details"] = {**found.details, "translation": made_by.details["translation"]}
    found = replace(found, **resolved)
    require_same(encoder, recorded, found)
    return as_query(found)


def as_query(spec: EncoderSpec) -> EncoderSpec:
    """With the prompt of queries, where the encoder has one for them and another for what is searched."""
    if "query_prompt" not in spec.details:
        return spec
    return replace(spec, details={**spec.details, "prompt": spec.details["query_prompt"]})


@dataclass(frozen=True)
class Query:
    """What to look for: any of a text, an image and an example, and what to look away from.

    image: path or URI of a file. like: key of a sample, like_id: an item's id, whose stored vector it is. text_weight:
    share of the text beside an image or example. not_weight: of `not_text`, beside 1 for all the rest.
    """

    __pydantic_config__ = ConfigDict(extra="forbid")

    text: str | None = None
    image: str | None = None
    not_text: str | None = None
    like: str | None = None
    like_id: int | None = None
    text_weight: Annotated[float | None, Field(ge=0, le=1, allow_inf_nan=False)] = None
    not_weight: Annotated[float | None, Field(ge=0, allow_inf_nan=False)] = None

    @property
    def needs_encoder(self) -> bool:
        return bool(self.text or self.image or self.not_text)


def embed_queries(
    spec: EncoderSpec | None,
    queries: Sequence[Query],
    text_weight: float = 0.5,
    device: str = "cpu",
    batch_size: int = 16,
    searched: Modality = "image",
    examples: Sequence[Vectors | None] | None = None,
    not_weight: float = 0.5,
) -> Vectors:
    """float32 [q, dim], by the run's own decode and encode steps; [q, count, dim] where they have several vectors.

    Of a query with a text and an image or example, text_weight · text + (1 - text_weight) · the other, less
    not_weight · not_text, each of unit length first; a text and an image are, among multimodal vectors, that of the
    two together. A query of one thing is its vector as it is. fp16 models run in fp32 on a CPU, which has no fast half
    precision. spec: None where no query needs one. searched: the modality that they are to be compared with.
    examples: of each query the stored vector it is like.
    Raises: InputError for a query that cannot be read, ConfigError for one that the encoder has no tower for, or
    whose vector cannot be compared with those searched.
    """
    examples = examples or [None] * len(queries)
    _require_asked(queries, examples)
    weights = [_Weights.of(query, text_weight, not_weight) for query in queries]
    asked = [query for query in queries if query.text or query.image]
    denied = [Query(text=query.not_text) for query in queries if query.not_text]
    embedded = iter(_embedded(spec, [*asked, *denied], device, batch_size, searched) if spec else [])
    given = [next(embedded) if query.text or query.image else {} for query in queries]
    away = [next(embedded)["text"] if query.not_text else None for query in queries]
    return np.stack([_combined(*each) for each in zip(queries, given, examples, away, weights, strict=True)])


@dataclass(frozen=True)
class _Weights:
    text: float
    away: float

    @classmethod
    def of(cls, query: Query, text: float, away: float) -> _Weights:
        found = cls(
            text if query.text_weight is None else query.text_weight,
            away if query.not_weight is None else query.not_weight,
        )
        if not (0 <= found.text <= 1 and 0 <= found.away < inf):
            raise ConfigError(
                f"A query weighs its text {found.text:g} and what it looks away from {found.away:g}",
                "Give a text weight from 0 to 1, and a finite --not-weight of 0 or more.",
            )
        return found


def _combined(
    query: Query, given: dict[Modality, Vectors], example: Vectors | None, away: Vectors | None, weights: _Weights
) -> Vectors:
    others = [vector for modality, vector in given.items() if modality != "text"]
    others += [example] if example is not None else []
    texts = [given["text"]] if "text" in given else []
    if len(texts) + len(others) == 1 and away is None:
        return (texts + others)[0]
    if len({vector.shape for vector in [*texts, *others, *([away] if away is not None else [])]}) > 1:
        raise ConfigError("Vectors of different numbers or dimensions cannot be mixed", "Ask with one.")
    share = weights.text if others else 1.0
    total = sum((share * unit(text) for text in texts), np.float32(0))
    total = total + sum(((1 - share if texts else 1.0) * unit(other) for other in others), np.float32(0))
    total = total - (weights.away * unit(away) if away is not None else 0)
    if not _NOTHING <= np.linalg.norm(total) < inf:
        raise InputError(
            f"What the query {query.text or query.like or query.image!r} looks for and away from cancel out",
            "Weigh them otherwise.",
        )
    return unit(np.asarray(total, np.float32))


def _embedded(
    spec: EncoderSpec, queries: Sequence[Query], device: str, batch_size: int, searched: Modality
) -> list[dict[Modality, Vectors]]:
    """The vectors of each query's text and image, by modality."""
    if not queries:
        return []
    kinds = [_kinds(query, searched) for query in queries]
    modalities = [modality for modality in MODALITIES if any(modality in kind for kind in kinds)]
    _require_towers(spec, modalities)
    _require_comparable(spec, kinds, searched)
    _require_unicode(queries)
    if device == "cpu" and spec.precision == "fp16":
        spec = replace(spec, precision="fp32")
    settings = EncodeConfig(threads=cpu_count() or 1)
    target = Target("", spec, tuple(modalities), min(batch_size, len(queries)))
    samples = _as_samples(queries, Store(options=spec.options))
    pixels = decode_batch(samples, spec, DecodeConfig(max_aspect=spec.max_aspect), modalities)
    encoded = Encode([target], settings, device)(pixels).to_pylist()
    return [_vectors(query, kind, row, spec) for query, kind, row in zip(queries, kinds, encoded, strict=True)]


def _kinds(query: Query, searched: Modality) -> list[Modality]:
    """The modalities whose vectors make the query's."""
    if query.image and query.text and searched == "multimodal":
        return ["multimodal"]
    given: list[Modality] = ["image"] if query.image else []
    return [*given, "text"] if query.text else given


def _require_towers(spec: EncoderSpec, modalities: Sequence[Modality]) -> None:
    if lacking := [modality for modality in modalities if modality not in spec.modalities]:
        raise ConfigError(f"{spec.name} embeds {', '.join(spec.modalities)}, not {lacking[0]}", "Ask with the other.")


def _require_asked(queries: Sequence[Query], examples: Sequence[Vectors | None]) -> None:
    given = [query.text or query.image or example is not None for query, example in zip(queries, examples, strict=True)]
    if not given or not all(given):
        raise ConfigError(
            "A query has neither text nor image nor what it is like", "Give --text, --image or --like; --not-text too."
        )


def _require_comparable(spec: EncoderSpec, kinds: Sequence[Sequence[Modality]], searched: Modality) -> None:
    """Raises: ConfigError where a query's vector is of another space than those that are searched."""
    if searched not in spec.modalities:
        raise ConfigError(f"{spec.name} embeds {', '.join(spec.modalities)}, not {searched}", "Search another.")
    space = spec.vectors[searched].space
    for kind in kinds:
        if strangers := [modality for modality in kind if spec.vectors[modality].space != space]:
            there = [modality for modality in spec.modalities if spec.vectors[modality].space == space]
            raise ConfigError(
                f"{spec.name}: {strangers[0]} vectors are of the space {spec.vectors[strangers[0]].space}, {searched} "
                f"vectors of {space}: they cannot be compared",
                f"Ask with {' or '.join(there)}" + (" (an image and its caption)." if "multimodal" in there else "."),
            )
        if len({spec.vectors[modality].count for modality in kind}) > 1:
            raise ConfigError("An image and a text of different numbers of vectors cannot be mixed", "Ask with one.")


def _require_unicode(queries: Sequence[Query]) -> None:
    for query in queries:
        try:
            (query.text or "").encode()
        except UnicodeEncodeError:
            raise InputError(f"The query {query.text!r} is not Unicode text", "Write it in UTF-8.") from None


def _as_samples(queries: Sequence[Query], store: Store) -> pa.Table:
    rows = [
        {
            "row": at,
            "end": False,
            "key": str(at),
            "captions": [query.text] if query.text else [],
            "has_image": bool(query.image),
            "image": _image_bytes(store, query.image) if query.image else None,
            "rejects": [],
        }
        for at, query in enumerate(queries)
    ]
    return pa.Table.from_pylist(rows, schema=SAMPLE)


def _image_bytes(store: Store, path: str) -> bytes:
    try:
        return store.read(path)
    except (OSError, ValueError, ImportError) as error:
        raise InputError(f"The query image {path} cannot be read: {error}", "Check the path.") from None


def _vectors(
    query: Query, kinds: Sequence[Modality], row: dict[str, Any], spec: EncoderSpec
) -> dict[Modality, Vectors]:
    if row["rejects"]:
        reject = row["rejects"][0]
        what = query.text if reject["modality"] == "text" else query.image
        raise InputError(
            f"The query {what!r} cannot be embedded: {reject['reason']} {reject['detail']}", "Try another."
        )
    return {modality: _of(row, modality, spec.vectors[modality]) for modality in kinds}


def _of(row: dict[str, Any], modality: Modality, vectors: VectorSpec) -> Vectors:
    found = row["text_vectors"][0]["vector"] if modality == "text" else row[f"{modality}_vector"]
    values = np.array(found, np.float32)
    return values if vectors.count == 1 else values.reshape(vectors.count, vectors.dim)
