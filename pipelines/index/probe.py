"""One index shard: opened with its search parameters set, and asked."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pipelines.errors import IndexBuildError
from pipelines.index.among import ask, ask_among
from pipelines.index.cache import Cache, opened_shard
from pipelines.index.manifest import IndexShard
from pipelines.index.parts import Vectors
from pipelines.index.recall import Top
from pipelines.index.selection import Selection
from pipelines.index.tune import apply
from pipelines.storage import Store


@dataclass(frozen=True)
class Opening:
    """How the index shards in a release's folder are opened.

    key: FAISS factory string of the index. cache: where those that are not on this machine go.
    """

    store: Store
    folder: str
    key: str
    params: str
    cache: Cache | None = None

    def open(self, shard: IndexShard) -> Any:
        """Ready to search.

        Raises: IndexBuildError where it is not what the manifest says, or the parameters do not suit it.
        """
        index = opened_shard(self.store, self.folder, shard, self.key, self.cache)
        try:
            apply(index, self.params)
        except RuntimeError as error:
            reason = str(error).strip().splitlines()[-1]
            raise IndexBuildError(
                f"Search parameters {self.params!r} do not suit the index: {reason}", "Try nprobe=8."
            ) from None
        return index


def probe(opening: Opening, shard: IndexShard, queries: Vectors, k: int, among: Selection | None = None) -> Top:
    """What one index shard finds of float32 [q, dim] queries; open until then."""
    return ask_shard(opening.open(shard), shard, queries, k, among)


def ask_shard(index: Any, shard: IndexShard, queries: Vectors, k: int, among: Selection | None = None) -> Top:
    return ask(index, queries, k) if among is None else ask_among(index, queries, k, among, shard.first_id)
