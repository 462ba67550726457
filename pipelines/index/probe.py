"""One index shard: opened with its search parameters set, and asked."""

from __future__ import annotations

from typing import Any

from pipelines.errors import IndexBuildError
from pipelines.index.parts import Vectors
from pipelines.index.recall import Top
from pipelines.index.release import IndexShard, open_shard
from pipelines.index.tune import apply
from pipelines.storage import Store


def probe(store: Store, folder: str, shard: IndexShard, params: str, queries: Vectors, k: int) -> Top:
    """What one index shard finds of float32 [q, dim] queries; memory for it until then."""
    return ask(open_with(store, folder, shard, params), queries, k)


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


def ask(index: Any, queries: Vectors, k: int) -> Top:
    scores, ids = index.search(queries, k)
    return Top(ids, scores)
