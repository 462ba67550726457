"""Queries as vectors: texts and images through the encoder that made an output."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from os import cpu_count
from typing import Any

import numpy as np
import pyarrow as pa
from pydantic import ConfigDict

from pipelines.config import DecodeConfig, EncodeConfig
from pipelines.contracts import MODALITIES, SAMPLE, Modality
from pipelines.decode import decode_batch
from pipelines.encode import Encode
from pipelines.encoders import registry
from pipelines.encoders.base import EncoderSpec
from pipelines.errors import ConfigError, InputError
from pipelines.index.parts import Vectors
from pipelines.record import read_record, require_same
from pipelines.storage import Store


def query_spec(store: Store, encoder: str) -> EncoderSpec:
    """The encoder that made embeddings/<encoder>, found again by its name.

    Raises: PreflightError with the differences where what now bears the name is another.
    """
    recorded = read_record(store).encoders[encoder]
    made_by = recorded.encoder_spec(store.options)
    found = registry.describe(made_by.name, store.options)
    if found.image and made_by.image:
        found = replace(found, image=replace(found.image, alpha=made_by.image.alpha))
    resolved = {name: getattr(made_by, name) for name in ("precision", "normalize", "dtype", "max_aspect")}
    found = replace(found, **resolved)
    require_same(encoder, recorded, found)
    return found


@dataclass(frozen=True)
class Query:
    """A text, an image, or both. image: path or URI of a file."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    text: str | None = None
    image: str | None = None


def embed_queries(
    spec: EncoderSpec, queries: Sequence[Query], text_weight: float = 0.5, device: str = "cpu", batch_size: int = 16
) -> Vectors:
    """float32 [q, dim], by the run's own decode and encode steps.

    Of a query with both, text_weight · text + (1 - text_weight) · image, each of unit length first.
    fp16 models run in fp32 on a CPU, which has no fast half precision.
    Raises: InputError for a query that cannot be read, ConfigError for one that the encoder has no tower for.
    """
    asked = {"image": any(query.image for query in queries), "text": any(query.text for query in queries)}
    modalities = [modality for modality in MODALITIES if asked[modality]]
    _require_towers(spec, queries, modalities)
    _require_unicode(queries)
    if device == "cpu" and spec.precision == "fp16":
        spec = replace(spec, precision="fp32")
    settings = EncodeConfig(
        precision=spec.precision, batch_size=min(batch_size, len(queries)), threads=cpu_count() or 1
    )
    samples = _as_samples(queries, Store(options=spec.options))
    pixels = decode_batch(samples, spec, DecodeConfig(max_aspect=spec.max_aspect), modalities)
    encoded = Encode(spec, settings, modalities, device)(pixels).to_pylist()
    return np.stack([_mixed(query, row, text_weight) for query, row in zip(queries, encoded, strict=True)])


def _require_towers(spec: EncoderSpec, queries: Sequence[Query], modalities: Sequence[Modality]) -> None:
    if lacking := [modality for modality in modalities if modality not in spec.modalities]:
        raise ConfigError(f"{spec.name} embeds {', '.join(spec.modalities)}, not {lacking[0]}", "Ask with the other.")
    if not all(query.text or query.image for query in queries) or not queries:
        raise ConfigError("A query has neither text nor image", "Give --text, --image or both.")


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


def _mixed(query: Query, row: dict[str, Any], text_weight: float) -> Vectors:
    if row["rejects"]:
        reject = row["rejects"][0]
        what = query.image if reject["modality"] == "image" else query.text
        raise InputError(
            f"The query {what!r} cannot be embedded: {reject['reason']} {reject['detail']}", "Try another."
        )
    image = np.array(row["image_vector"], np.float32) if query.image else None
    text = np.array(row["text_vectors"][0]["vector"], np.float32) if query.text else None
    if image is None or text is None:
        found: Vectors | None = image if text is None else text
        assert found is not None
        return found
    mixed = text_weight * _unit(text) + (1 - text_weight) * _unit(image)
    return _unit(mixed)


def _unit(vector: Vectors) -> Vectors:
    return (vector / np.linalg.norm(vector)).astype(np.float32)
