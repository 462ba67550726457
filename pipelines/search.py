"""Find things in an output: vectors in, the nearest items out, each with its key, captions and place."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from os import cpu_count
from typing import Any

import numpy as np
import pyarrow as pa

from pipelines.config import DecodeConfig, EncodeConfig
from pipelines.contracts import MODALITIES, SAMPLE, Modality
from pipelines.decode import Decode
from pipelines.encode import Encode
from pipelines.encoders import registry
from pipelines.encoders.base import EncoderSpec
from pipelines.errors import ConfigError, IndexBuildError, InputError
from pipelines.index.parts import Parts, Vectors, batches, embeddings_folder, list_parts
from pipelines.index.recall import Top, exact, merge
from pipelines.index.release import Release, latest_or_none, open_shard, read_release
from pipelines.index.trace import Origin, trace_parts
from pipelines.index.tune import apply
from pipelines.record import FILE, read_record, require_same
from pipelines.storage import Store


@dataclass(frozen=True)
class Hit:
    """One item found. score: inner product, or squared L2 distance. id: in the release's id space."""

    id: int
    score: float
    key: str
    shard: str
    row: int
    caption_index: int | None
    caption: str | None
    captions: list[str | None]
    uri: str
    offset: int | None
    length: int | None
    row_group: int | None


class Searcher:
    """Searches one modality's vectors of one encoder of an output.

    encoder: its folder in `embeddings/`; may be left out where the output has one. release: a
    version, else the current one. exact: compares every vector with the query, a batch at a time,
    and needs no index. Without a release, `metric` says how. params: FAISS search parameters in
    place of the release's.
    Raises: ConfigError for an encoder that is not there, IndexBuildError for an index that is not.
    """

    def __init__(
        self,
        store: Store,
        encoder: str | None = None,
        modality: Modality = "image",
        release: str | None = None,
        exact: bool = False,
        metric: str = "ip",
        params: str | None = None,
    ) -> None:
        self.store, self.modality = store, modality
        self.encoder = choose_encoder(store, encoder)
        self.release = self._release(release, exact)
        self.metric = self.release.metric if self.release else metric
        self.parts = self.release.parts if self.release else self._parts()
        self._indexes = [] if exact or not self.release else open_shards(store, self.release, params)

    def _release(self, version: str | None, exact: bool) -> Release | None:
        if exact and version is None:
            return latest_or_none(self.store, self.encoder, self.modality)
        return read_release(self.store, self.encoder, self.modality, version)

    def _parts(self) -> Parts:
        return list_parts(self.store, embeddings_folder(self.encoder, self.modality))

    def nearest(self, queries: Vectors, k: int) -> Top:
        """Ids and scores of the k nearest of each query, float32 [q, dim], best first."""
        queries = np.ascontiguousarray(queries, np.float32)
        if queries.ndim != 2 or queries.shape[1] != self.parts.dim:
            raise ConfigError(
                f"The queries have shape {queries.shape}; embeddings/{self.encoder} has {self.parts.dim} dimensions",
                "Embed them with the output's own encoder.",
            )
        if not self._indexes:
            return exact(queries, batches(self.store, self.parts), k, self.metric)
        found = (index.search(queries, k) for index in self._indexes)
        return merge((Top(ids, scores) for scores, ids in found), k, self.metric)

    def search(self, queries: Vectors, k: int = 10) -> list[list[Hit]]:
        """For each query, float32 [q, dim], its k nearest items, best first; fewer where there are fewer."""
        top = self.nearest(queries, k)
        ids = np.unique(top.ids[top.ids >= 0]).tolist()
        origins = dict(zip(ids, trace_parts(self.store, self.parts, ids), strict=True))
        return [
            [_hit(origins[id], score) for id, score in zip(row_ids, row_scores, strict=True) if id >= 0]
            for row_ids, row_scores in zip(top.ids.tolist(), top.scores.tolist(), strict=True)
        ]


def _hit(origin: Origin, score: float) -> Hit:
    return Hit(
        id=origin.id,
        score=score,
        key=origin.key,
        shard=origin.shard,
        row=origin.row,
        caption_index=origin.caption_index,
        caption=origin.caption,
        captions=origin.captions,
        uri=origin.uri,
        offset=origin.offset,
        length=origin.length,
        row_group=origin.row_group,
    )


def choose_encoder(store: Store, encoder: str | None) -> str:
    """The encoder's folder: the named one, or the only one. Raises: ConfigError listing what there is."""
    known = sorted(read_record(store).encoders)
    if not known:
        raise InputError(
            f"{store.uri()} is not the output of an embed run: it has no {FILE}",
            "Check the path, or run `vecmill embed` first.",
        )
    listed = f"It has: {', '.join(known)}."
    if encoder is None and len(known) == 1:
        return known[0]
    if encoder is None:
        raise ConfigError(f"{store.uri()} has {len(known)} encoders: name one with --encoder", listed)
    if encoder not in known:
        raise ConfigError(f"{store.uri()} has no encoder {encoder!r}", listed)
    return encoder


def open_shards(store: Store, release: Release, params: str | None = None) -> list[Any]:
    """Every index shard of a release in memory, set to its search parameters or to `params`."""
    indexes = [open_shard(store, release.folder, shard) for shard in release.shards]
    for index in indexes:
        _apply(index, release.search_params if params is None else params)
    return indexes


def _apply(index: Any, params: str) -> None:
    try:
        apply(index, params)
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[-1]
        raise IndexBuildError(
            f"Search parameters {params!r} do not suit the index: {reason}", "Try nprobe=8."
        ) from None


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
    if device == "cpu" and spec.precision == "fp16":
        spec = replace(spec, precision="fp32")
    settings = EncodeConfig(
        precision=spec.precision, batch_size=min(batch_size, len(queries)), threads=cpu_count() or 1
    )
    pixels = Decode(spec, DecodeConfig(max_aspect=spec.max_aspect), modalities)(
        _as_samples(queries, Store(options=spec.options))
    )
    encoded = Encode(spec, settings, modalities, device)(pixels).to_pylist()
    return np.stack([_mixed(query, row, text_weight) for query, row in zip(queries, encoded, strict=True)])


def _require_towers(spec: EncoderSpec, queries: Sequence[Query], modalities: Sequence[Modality]) -> None:
    if lacking := [modality for modality in modalities if modality not in spec.modalities]:
        raise ConfigError(f"{spec.name} embeds {', '.join(spec.modalities)}, not {lacking[0]}", "Ask with the other.")
    if not all(query.text or query.image for query in queries) or not queries:
        raise ConfigError("A query has neither text nor image", "Give --text, --image or both.")


def _as_samples(queries: Sequence[Query], store: Store) -> pa.Table:
    rows = [
        {
            "row": at,
            "end": False,
            "key": str(at),
            "captions": [query.text] if query.text else [],
            "has_image": query.image is not None,
            "image": _image_bytes(store, query.image) if query.image else None,
            "rejects": [],
        }
        for at, query in enumerate(queries)
    ]
    return pa.Table.from_pylist(rows, schema=SAMPLE)


def _image_bytes(store: Store, path: str) -> bytes:
    try:
        return store.read(path)
    except OSError as error:
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
