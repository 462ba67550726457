"""Re-ranking: what an index of codes finds is scored again with the stored vectors, read by id in O(1).

As FAISS's IndexRefine does with all vectors in memory (Jégou, Tavenard, Douze and Amsaleg, Searching in one billion
vectors: re-rank with source coding, ICASSP 2011); here they stay in a `.npy` beside each index shard.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from pipelines.config import IndexConfig
from pipelines.errors import IndexBuildError
from pipelines.index.cache import Cache, used_on_disk
from pipelines.index.choose import holds_codes
from pipelines.index.files import gone
from pipelines.index.manifest import Coding, IndexShard, Release, SideFile
from pipelines.index.parts import BATCH_BYTES, Ids, Vectors
from pipelines.index.recall import Top, best_first, empty_top
from pipelines.storage import Store

GAP_BYTES = 256 * 2**10
"""Bytes between two vectors up to which one request reads both: about what a store sends while it answers another."""
SPAN_BYTES = 4 * 2**20
LEAST_HITS = 10
_LARGEST_CODE = 127
_BYTES = {"float16": 2, "int8": 1}

Rows = Callable[[Ids], "NDArray[Any]"]


def candidates(k: int, factor: int) -> int:
    """How many are scored again for k hits: k × factor, and for fewer than 10 hits as many as for 10.

    The nearest of all is as easily beyond ten candidates of codes as the tenth is beyond a hundred.
    """
    return max(k, LEAST_HITS) * factor


def rerank_dtype(key: str, settings: IndexConfig) -> str:
    """float16, int8 or none."""
    if settings.rerank == "auto":
        return "float16" if holds_codes(key) else "none"
    return settings.rerank


def side_bytes(dtype: str, rows: int, dim: int) -> int:
    return rows * dim * _BYTES.get(dtype, 0)


def learn_coding(dtype: str, sample: Vectors) -> Coding | None:
    """Of int8 the centre and step of each dimension, from what float32 [n, dim] holds; beyond it, codes are cut off."""
    if dtype == "none":
        return None
    if dtype == "float16":
        return Coding(dtype="float16")
    low, high = sample.min(axis=0), sample.max(axis=0)
    # The step of a dimension that never varies does not matter, but may not be 0.
    step = np.maximum((high - low) / (2 * _LARGEST_CODE), 1e-6)
    return Coding(dtype="int8", centre=tuple(((low + high) / 2).tolist()), step=tuple(step.tolist()))


def encode(coding: Coding, vectors: Vectors) -> NDArray[Any]:
    if coding.dtype == "float16":
        return vectors.astype(np.float16)
    centre, step = _scale(coding)
    return np.asarray(np.clip(np.rint((vectors - centre) / step), -_LARGEST_CODE, _LARGEST_CODE), np.int8)


def decode(coding: Coding, stored: NDArray[Any]) -> Vectors:
    if coding.dtype == "float16":
        return stored.astype(np.float32)
    centre, step = _scale(coding)
    return np.asarray(stored * step + centre, np.float32)


def _scale(coding: Coding) -> tuple[Vectors, Vectors]:
    return np.array(coding.centre, np.float32), np.array(coding.step, np.float32)


class SideWriter:
    """Writes a side file to local disk, a batch at a time."""

    def __init__(self, local: Path, coding: Coding, rows: int, dim: int) -> None:
        self._local, self._coding, self._digest, self._exact = local, coding, hashlib.sha256(), True
        self._file = local.open("wb")
        head = {"descr": np.dtype(coding.dtype).str, "fortran_order": False, "shape": (rows, dim)}
        np.lib.format.write_array_header_1_0(self._file, head)  # type: ignore[no-untyped-call]
        self._file.flush()
        self._header = self._file.tell()
        self._digest.update(local.read_bytes())

    def add(self, vectors: Vectors) -> None:
        stored = encode(self._coding, vectors)
        self._exact = self._exact and bool(np.array_equal(decode(self._coding, stored), vectors))
        data = stored.tobytes()
        self._digest.update(data)
        self._file.write(data)

    def put(self, store: Store, target: str) -> SideFile:
        self._file.close()
        store.put_atomic(target, self._local)
        return SideFile(
            file=target.rpartition("/")[2],
            header=self._header,
            bytes=self._local.stat().st_size,
            sha256=self._digest.hexdigest(),
            exact=self._exact,
        )


class ById(Protocol):
    """Vectors, float32 [n, dim], by ascending int64 ids."""

    @property
    def dim(self) -> int: ...

    def take(self, ids: Ids) -> Vectors: ...


class StoredVectors:
    """The vectors of some index shards by FAISS id, from their side files.

    A local side file is mapped, and stays readable for as long as this is held, whatever becomes of the release;
    a remote one is read in ranges, or is mapped as well once it is in the cache, where one is given.
    Raises: IndexBuildError where one is gone or not of its size.
    """

    def __init__(
        self,
        store: Store,
        folder: str,
        shards: Sequence[IndexShard],
        coding: Coding,
        dim: int,
        cache: Cache | None = None,
    ) -> None:
        self.coding, self.dim = coding, dim
        self._ends = np.array([shard.first_id + shard.rows for shard in shards], np.int64)
        self._firsts = [shard.first_id for shard in shards]
        self._rows = [_open(store, folder, shard, coding, dim, cache) for shard in shards]

    def take(self, ids: Ids) -> Vectors:
        """float32 [n, dim] of ascending int64 ids, all of these shards."""
        found = np.empty((len(ids), self.dim), np.float32)
        bounds = [0, *np.searchsorted(ids, self._ends).tolist()]
        for (start, stop), first, rows in zip(pairwise(bounds), self._firsts, self._rows, strict=True):
            if stop > start:
                found[start:stop] = decode(self.coding, rows(ids[start:stop] - first))
        return found


def stored_vectors(store: Store, release: Release, cache: Cache | None = None) -> StoredVectors | None:
    """All of a release's, None where it has no side files. They go into the cache if all of the release fits there."""
    if release.rerank is None:
        return None
    if cache and sum(file.bytes for file in release.files) > cache.max_bytes:
        cache = None
    return StoredVectors(store, release.folder, release.shards, release.rerank.coding, release.parts.dim, cache)


def _open(store: Store, folder: str, shard: IndexShard, coding: Coding, dim: int, cache: Cache | None) -> Rows:
    if shard.side is None:
        raise IndexBuildError(f"{store.uri(folder)}/{shard.file} has no vectors beside it", "Search with --rerank 0.")
    side, path, dtype = shard.side, f"{folder}/{shard.side.file}", np.dtype(coding.dtype)

    def opened(local: Path | None) -> Rows:
        if local:
            return partial(_of_map, np.memmap(local, dtype, "r", side.header, (shard.rows, dim)))
        if store.stat(path).bytes != side.bytes:
            raise IndexBuildError(f"{store.uri(path)} is not what its manifest says", "Index again with --force.")
        return partial(_of_ranges, store, path, side.header, dtype, dim)

    try:
        return used_on_disk(store, path, side, cache, opened)
    except FileNotFoundError:
        raise IndexBuildError(
            f"{store.uri(path)} is gone", "Search again, in the current release, or with --rerank 0."
        ) from None


def _of_map(mapped: NDArray[Any], positions: Ids) -> NDArray[Any]:
    return np.asarray(mapped[positions])


def _of_ranges(store: Store, path: str, header: int, dtype: Any, dim: int, positions: Ids) -> NDArray[Any]:
    width = dim * dtype.itemsize
    found = np.empty((len(positions), dim), dtype)
    filled = 0
    for spans in _requests(_spans(positions, width), width):
        ranges = [(header + int(span[0]) * width, header + (int(span[-1]) + 1) * width) for span in spans]
        for span, data in zip(spans, _read(store, path, ranges), strict=True):
            found[filled : filled + len(span)] = np.frombuffer(data, dtype).reshape(-1, dim)[span - span[0]]
            filled += len(span)
    return found


def _spans(positions: Ids, width: int) -> list[Ids]:
    """Ascending positions, cut where the next is far off or the bytes from the first become many."""
    far = np.diff(positions) * width > GAP_BYTES
    many = np.diff(positions * width // SPAN_BYTES) > 0
    return np.split(positions, np.flatnonzero(far | many) + 1)


def _requests(spans: list[Ids], width: int) -> Iterator[list[Ids]]:
    """Spans that are read at once: of BATCH_BYTES together, or of one."""
    batch: list[Ids] = []
    size = 0
    for span in spans:
        more = int(span[-1] - span[0] + 1) * width
        if batch and size + more > BATCH_BYTES:
            yield batch
            batch, size = [], 0
        batch.append(span)
        size += more
    yield batch


def _read(store: Store, path: str, ranges: list[tuple[int, int]]) -> list[bytes]:
    try:
        return store.read_ranges(path, ranges)
    except FileNotFoundError:
        raise gone(store, path) from None


def scores_of(queries: Vectors, ids: Ids, stored: ById, metric: str) -> Vectors:
    """float32 [q, n]: each query, float32 [q, dim], against the stored vectors of its own ids, int64 [q, n].

    NaN for id -1. A vector is read once however many queries ask for it, and no more than BATCH_BYTES of them are held.
    """
    scores = np.full(ids.shape, np.nan, np.float32)
    wanted = np.unique(ids[ids >= 0])
    step = max(1, BATCH_BYTES // (4 * stored.dim))
    for start in range(0, len(wanted), step):
        block = wanted[start : start + step]
        vectors = stored.take(block)
        mine = (ids >= block[0]) & (ids <= block[-1])
        for row in np.flatnonzero(mine.any(axis=1)):
            these = vectors[np.searchsorted(block, ids[row, mine[row]])]
            scores[row, mine[row]] = _scores(queries[row], these, metric)
    return scores


def _scores(query: Vectors, vectors: Vectors, metric: str) -> Vectors:
    if metric == "ip":
        return vectors @ query
    apart = vectors - query
    return np.asarray(np.einsum("nd,nd->n", apart, apart))


def rescored(ids: Ids, scores: Vectors, k: int, metric: str) -> Top:
    """The best k of candidates, int64 [q, n], by their new scores."""
    worst = np.float32(-np.inf if metric == "ip" else np.inf)
    return best_first(ids, np.where(ids < 0, worst, scores), k, metric)


def rerank(queries: Vectors, found: Top, stored: StoredVectors, k: int, metric: str) -> Top:
    """The best k of what was found of float32 [q, dim] queries, by the stored vectors."""
    return rescored(found.ids, scores_of(queries, found.ids, stored, metric), k, metric)


def rerank_in_blocks(
    queries: Vectors, found: Top, stored: StoredVectors, k: int, size: int, blocks: int, metric: str
) -> Top:
    """k × blocks hits, of which each k are the best of `size` more candidates that are left.

    So a longer list begins with the shorter one, which it would not if more candidates could get to the front.
    """
    scores = scores_of(queries, found.ids, stored, metric)
    rest = empty_top(len(queries))
    best = []
    for start in range(0, blocks * size, size):
        ids = np.concatenate([rest.ids, found.ids[:, start : start + size]], axis=1)
        pool = np.concatenate([rest.scores, scores[:, start : start + size]], axis=1)
        ranked = rescored(ids, pool, ids.shape[1], metric)
        best.append(ranked.between(0, k))
        rest = ranked.between(k, ids.shape[1])
    return Top(np.concatenate([top.ids for top in best], axis=1), np.concatenate([top.scores for top in best], axis=1))
