"""One index shard: opened with its search parameters set, and asked."""

from __future__ import annotations

from typing import Any

from pipelines.errors import IndexBuildError
from pipelines.index.among import ask, ask_among
from pipelines.index.parts import Vectors
from pipelines.index.recall import Top
from pipelines.index.release import IndexShard, open_shard
from pipelines.index.selection import Selection
from pipelines.index.tune import apply
from pipelines.storage import Store


def probe(
    store: Store, folder: str, shard: IndexShard, params: str, queries: Vectors, k: int, among: Selection | None = None
) -> Top:
    """What one index shard finds of float32 [q, dim] queries; memory for it until then."""
    return ask_shard(open_with(store, folder, shard, params), shard, queries, k, among)


def open_with(store: Store, folder: str, shard: IndexShard, params: str) -> Any:
    """An index shard in memory, ready to search.

    Raises: IndexBuildError where it is not what the manifest says, or the parameters do not suit it.
    """
    index = open_shard(store, folder, shard)
    try:
        apply(index, params)
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[-1]
        raise IndexBuildError(
            f"Search parameters {params!r} do not suit the index: {reason}", "Try nprobe=8."
        ) from None
    return index


def ask_shard(index: Any, shard: IndexShard, queries: Vectors, k: int, among: Selection | None = None) -> Top:
    return ask(index, queries, k) if among is None else ask_among(index, queries, k, among, shard.first_id)
