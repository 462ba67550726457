"""The Ray tasks of a build, each on a run of parts: read what was picked, fill an index shard, probe it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import ray

from pipelines.index.parts import Parts, Vectors, batches
from pipelines.index.probe import probe
from pipelines.index.recall import Top, empty_top, exact_in_batch, merge
from pipelines.index.release import IndexShard, load_index, sha256_of
from pipelines.index.train import read_picked
from pipelines.observe import peak_memory_mib
from pipelines.storage import Store, scratch_folder


@dataclass(frozen=True)
class Filled:
    """An index shard in its place, and what the one pass over its parts found besides.

    truth: the exact nearest of each query among these parts.
    """

    shard: IndexShard
    truth: Top
    peak_mib: float


def fill(store: Store, parts: Parts, trained: str, target: str, queries: Vectors, k: int, metric: str) -> Filled:
    """One index shard from a run of parts, put at `target`; memory for it and one batch.

    trained: path of the empty trained index. queries: float32 [q, dim], compared with every vector
    that goes by. Putting the same shard twice does no harm, so Ray may retry.
    """
    index, _ = load_index(store, trained)
    truth = empty_top(len(queries))
    for first, batch in batches(store, parts):
        index.add_with_ids(batch, np.arange(first, first + len(batch)))
        truth = merge([truth, exact_in_batch(queries, first, batch, k, metric)], k, metric)
    return Filled(_put(store, index, target, parts.ranges[0].offset), truth, peak_memory_mib())


def _put(store: Store, index: Any, target: str, first_id: int) -> IndexShard:
    with scratch_folder() as scratch:
        local = Path(scratch) / "shard.faiss"
        faiss.write_index(index, str(local))
        store.put_atomic(target, local)
        name = target.rpartition("/")[2]
        size = local.stat().st_size
        return IndexShard(file=name, first_id=first_id, rows=index.ntotal, bytes=size, sha256=sha256_of(local))


fill_task = ray.remote(num_cpus=1)(fill)
probe_task = ray.remote(num_cpus=1)(probe)
read_task = ray.remote(num_cpus=1)(read_picked)
