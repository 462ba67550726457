"""The Ray tasks of a build, each on a run of parts: read what was picked, fill an index shard, ask it."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import ray

from pipelines.errors import VecmillError
from pipelines.index.attempt import Filled, keep_filled
from pipelines.index.files import load_index, sha256_of
from pipelines.index.manifest import Coding, IndexShard, SideFile
from pipelines.index.measure import answer, score
from pipelines.index.parts import Parts, Vectors, batches, part_of, require_finite
from pipelines.index.recall import empty_top, exact_in_batch, merge
from pipelines.index.rerank import SideWriter
from pipelines.index.room import require_free_disk
from pipelines.index.train import read_picked
from pipelines.observe import peak_memory_mib
from pipelines.storage import Store, scratch_folder


def fill(
    store: Store,
    parts: Parts,
    trained: str,
    target: str,
    queries: Vectors,
    k: int,
    metric: str,
    coding: Coding | None = None,
    scratch_bytes: int = 0,
) -> Filled:
    """One index shard from a run of parts, put at `target`; memory for it and one batch.

    trained: path of the empty trained index. queries: float32 [q, dim], compared with every vector that goes by, for
    the k nearest of each; k is 0 where recall is not measured. coding: the vectors go, as it says, into a side file
    beside the target. scratch_bytes: of local disk, without which it does not begin. Putting the same shard twice
    does no harm, so Ray may retry.
    """
    index, _ = load_index(store, trained)
    truth = empty_top(len(queries))
    with scratch_folder() as scratch:
        require_free_disk(Path(scratch), scratch_bytes)
        side = SideWriter(Path(scratch) / "side.npy", coding, parts.rows, parts.dim) if coding else None
        for first, batch in batches(store, parts):
            require_finite(store, parts.path(part_of(parts, first)), batch)
            index.add_with_ids(batch, np.arange(first, first + len(batch)))
            if k:
                truth = merge([truth, exact_in_batch(queries, first, batch, k, metric)], k, metric)
            if side:
                side.add(batch)
        written = side.put(store, f"{target.removesuffix('.faiss')}.npy") if side else None
        shard = _put(store, index, target, parts.ranges[0].offset, Path(scratch) / "shard.faiss", written)
    return Filled(shard, truth, peak_memory_mib())


def _put(store: Store, index: Any, target: str, first_id: int, local: Path, side: SideFile | None) -> IndexShard:
    faiss.write_index(index, str(local))
    store.put_atomic(target, local)
    return IndexShard(
        file=target.rpartition("/")[2],
        first_id=first_id,
        rows=index.ntotal,
        bytes=local.stat().st_size,
        sha256=sha256_of(local),
        side=side,
    )


def fill_and_note(store: Store, note: str, *rest: Any) -> Filled:
    """`fill`, and last of all a note that it is done."""
    filled = fill(store, *rest)
    keep_filled(store, note, filled)
    return filled


fill_task = ray.remote(num_cpus=1)(fill_and_note)
answer_task = ray.remote(num_cpus=1)(answer)
score_task = ray.remote(num_cpus=1)(score)
read_task = ray.remote(num_cpus=1)(read_picked)


def stop(refs: list[Any]) -> None:
    """Cancels tasks, and returns once none of them runs."""
    for ref in refs:
        ray.cancel(ref)
    if refs:
        ray.wait(refs, num_returns=len(refs))


def results(begin: Iterable[Callable[[], Any]]) -> Iterator[Any]:
    """Of tasks, in order. begin: begins one, and returns its reference.

    Twice as many as the cluster has CPUs are under way at once: what they answer lies in the object store until its
    turn comes. Where one fails, none of the others goes on.
    """
    cluster: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
    under_way, most = deque[Any](), 2 * max(1, int(cluster.get("CPU", 1)))
    try:
        for begin_one in begin:
            if len(under_way) == most:
                yield get(under_way.popleft())
            under_way.append(begin_one())
        while under_way:
            yield get(under_way.popleft())
    except Exception:
        stop([*under_way])
        raise


def get(ref: Any) -> Any:
    """A task's result; our own errors as they were raised, without Ray's wrapping."""
    try:
        return ray.get(ref)
    except ray.exceptions.RayTaskError as error:
        raise (error.cause if isinstance(error.cause, VecmillError) else error) from None
