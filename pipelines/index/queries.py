"""What recall is measured with: vectors held out of training, and captions where there are any."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pipelines.config import IndexConfig
from pipelines.contracts import Modality
from pipelines.index.parts import Ids, NoVectorsError, Parts, Vectors, embeddings_folder, list_parts, pick, shard_of
from pipelines.index.train import Draw, read_picked
from pipelines.storage import Store


@dataclass(frozen=True)
class Queries:
    """What recall is measured with. kinds: float32 [q, dim] by modality, the index's own first.
    ids: int64 of the first queries, those that are in the index."""

    kinds: dict[str, Vectors]
    ids: Ids

    @property
    def vectors(self) -> Vectors:
        return np.concatenate(list(self.kinds.values()))

    @property
    def own(self) -> Ids:
        """int64 [queries]: each query's id in the index, -1 for a caption asked of an image index."""
        return np.concatenate([self.ids, np.full(len(self.vectors) - len(self.ids), -1)])

    def first(self, count: int) -> Queries:
        """So many of the first kind, or as many as there are."""
        kind, vectors = next(iter(self.kinds.items()))
        return Queries({kind: vectors[:count]}, self.ids[: len(vectors[:count])])

    def each(self, count: int) -> Queries:
        """So many of each kind, or as many as there are."""
        kept = np.zeros(len(self.own), bool)
        for rows in self.slices().values():
            kept[rows.start : min(rows.stop, rows.start + count)] = True
        return self.where(kept)

    def where(self, kept: NDArray[np.bool_]) -> Queries:
        """Those of the flags, one a query; kinds of which none is left are left out."""
        kinds = {kind: self.kinds[kind][kept[rows]] for kind, rows in self.slices().items()}
        return Queries({kind: asked for kind, asked in kinds.items() if len(asked)}, self.own[kept])

    def followed_by(self, more: Queries) -> Queries:
        """more: of other kinds."""
        return Queries({**self.kinds, **more.kinds}, np.concatenate([self.own, more.own]))

    def slices(self) -> dict[str, slice]:
        ends = np.cumsum([len(asked) for asked in self.kinds.values()])
        return {kind: slice(end - len(asked), end) for (kind, asked), end in zip(self.kinds.items(), ends, strict=True)}


def split_sample(chunks: Iterable[Vectors], drawn: Draw, dim: int) -> tuple[Vectors, Vectors]:
    """(train, queries) out of what was picked, in id order; holds no more than those and a chunk."""
    asked = np.zeros(len(drawn.train) + len(drawn.queries), bool)
    asked[drawn.queries] = True
    sample, queries = np.empty((len(drawn.train), dim), np.float32), np.empty((len(drawn.queries), dim), np.float32)
    at = 0
    for chunk in chunks:
        mask, before = asked[at : at + len(chunk)], int(asked[:at].sum())
        queries[before : before + int(mask.sum())] = chunk[mask]
        sample[at - before : at - before + int((~mask).sum())] = chunk[~mask]
        at += len(chunk)
    return sample, queries


ACROSS: dict[str, Modality] = {"image": "text", "text": "image"}
"""What else an index is asked with: captions look for images, and images for captions."""


def queries_across(
    store: Store, encoder: str, modality: Modality, indexed: Parts, settings: IndexConfig
) -> dict[str, Vectors]:
    """float32 [n, dim] of the other modality, of the indexed shards, drawn like the rest; empty where there are none.

    indexed: parts of `modality`.
    """
    other = ACROSS.get(modality)
    try:
        parts = list_parts(store, embeddings_folder(encoder, other)) if other else None
    except NoVectorsError:
        return {}
    if other is None or parts is None or (parts.dim, parts.count) != (indexed.dim, indexed.count):
        return {}
    shards = {shard_of(part.name) for part in indexed.ranges}
    theirs = tuple(part for part in parts.ranges if shard_of(part.name) in shards)
    parts = parts.model_copy(update={"ranges": theirs})
    picked = pick(parts, settings.recall_queries, settings.seed)
    return {other: read_picked(store, parts, picked)} if any(map(len, picked)) else {}
