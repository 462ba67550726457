"""What an index learns from: one sample drawn across all parts, taken once, queries held out of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import psutil
from autofaiss.external.metadata import IndexMetadata

from pipelines.config import IndexConfig
from pipelines.errors import IndexBuildError
from pipelines.index.choose import clusters, empty_index
from pipelines.index.parts import Ids, Parts, Vectors, pick, require_finite, take, vectors
from pipelines.storage import Store

VECTORS_PER_CLUSTER = 100
QUERY_SHARE = 10
HELD_OUT = 1_000
"""Queries where recall is not measured: a search is timed with them, and an int8 coding learnt."""
_CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")


@dataclass(frozen=True)
class Draw:
    """Which vectors are looked at. positions: of each part, sorted; train, queries: which of all those
    picked, in id order, train the index and which stay out of training to measure recall with."""

    positions: tuple[Ids, ...]
    train: Ids
    queries: Ids

    def ids(self, parts: Parts) -> Ids:
        """int64 FAISS ids of all that is picked, ascending."""
        return np.concatenate([part.offset + at for part, at in zip(parts.ranges, self.positions, strict=True)])


def draw(parts: Parts, key: str, settings: IndexConfig) -> Draw:
    """A seeded draw: the same for the same parts, key and settings. Queries are at most a tenth of all
    vectors, and none of them is trained on.

    Raises: IndexBuildError where there are too few vectors for the key, or too little memory for them.
    """
    trains = not empty_index(key, parts.dim, settings.metric).is_trained
    queries = min(settings.recall_queries or HELD_OUT, max(1, parts.rows // QUERY_SHARE))
    count = min(_train_count(key, settings), parts.rows - queries) if trains else 0
    if trains:
        _require_enough(key, count)
        _require_memory(key, parts, count)
    positions = pick(parts, count + queries, settings.seed)
    order = np.random.default_rng([settings.seed, len(positions), 1]).permutation(sum(map(len, positions)))
    return Draw(tuple(positions), np.sort(order[queries:]), np.sort(order[:queries]))


def _train_count(key: str, settings: IndexConfig) -> int:
    auto = settings.train_vectors == "auto"
    return VECTORS_PER_CLUSTER * clusters(key) if auto else int(settings.train_vectors)


def _require_enough(key: str, count: int) -> None:
    if count < clusters(key):
        raise IndexBuildError(
            f"{key} learns {clusters(key):,} clusters, from {count:,} vectors",
            "Raise index.train_vectors, leave index.index_key to autofaiss, or name a key of fewer clusters.",
        )


def _require_memory(key: str, parts: Parts, count: int) -> None:
    needed = IndexMetadata(key, parts.rows, parts.dim).compute_memory_necessary_for_training(count)
    available = available_bytes()
    if needed > available:
        fitting = int(count * available / needed)
        raise IndexBuildError(
            f"Training {key} on {count:,} vectors takes {needed / 2**30:.1f} GiB; {available / 2**30:.1f} GiB are free",
            f"Set index.train_vectors to {fitting:,} or less, or index on a machine with more memory.",
        )


def available_bytes() -> int:
    """Memory that this process can still take, of the machine's and of its container's."""
    free = int(psutil.virtual_memory().available)
    limit = _CGROUP_LIMIT.read_text().strip() if _CGROUP_LIMIT.exists() else "max"
    return free if limit == "max" else min(free, int(limit) - int(psutil.Process().memory_info().rss))


def read_picked(store: Store, parts: Parts, positions: Sequence[Ids]) -> Vectors:
    """float32 [n, dim]: of each part the vectors at its sorted positions. One row group at a time is held."""
    found = np.empty((sum(map(len, positions)), parts.dim), np.float32)
    filled = 0
    for part, wanted in zip(parts.ranges, positions, strict=True):
        if len(wanted):
            column = take(store, parts.path(part), wanted, ["embedding"])["embedding"]
            found[filled : filled + len(wanted)] = vectors(column, parts.dim)
            require_finite(store, parts.path(part), found[filled : filled + len(wanted)])
            filled += len(wanted)
    return found


def train(key: str, metric: str, sample: Vectors, dim: int) -> Any:
    """An empty FAISS index that has learnt its transform, clusters and codes from float32 [n, dim].

    Where FAISS has GPUs here, they find the clusters of an IVF; the index itself stays on the CPU.
    """
    index = empty_index(key, dim, metric)
    if not index.is_trained:
        ivf = faiss.try_extract_index_ivf(index)
        if ivf is not None and faiss.get_num_gpus():
            # As FAISS's own benchmarks do. Held until training is over: FAISS only borrows it.
            on_gpus = faiss.index_cpu_to_all_gpus(faiss.IndexFlat(ivf.d, ivf.metric_type))
            ivf.clustering_index = on_gpus
        index.train(sample)
        if ivf is not None:
            ivf.clustering_index = None
    return index
