"""What a finished index finds, with and without re-ranking, and whether its ids lead back to what was indexed."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import faiss
import numpy as np
from numpy.typing import NDArray

from pipelines.errors import IndexBuildError
from pipelines.index.among import transformed
from pipelines.index.files import open_shard
from pipelines.index.manifest import Coding, IndexShard
from pipelines.index.parts import Ids, Parts, Vectors
from pipelines.index.probe import ask_shard
from pipelines.index.queries import Queries
from pipelines.index.recall import DEPTHS, Top, merge, recall_at, without
from pipelines.index.rerank import StoredVectors, candidates, decode, encode, rerank, rescored, scores_of
from pipelines.index.selection import Selection
from pipelines.index.trace import trace_parts
from pipelines.index.tune import apply
from pipelines.storage import Store

CHECKED_IDS = 64
CURVE_K = 10
TIMED_QUERIES, TIMED_S = 50, 1.0
Flags = NDArray[np.bool_]


@dataclass(frozen=True)
class Ask:
    """Search parameters, and how many candidates a query gets with them."""

    params: str
    depth: int


@dataclass(frozen=True)
class Answers:
    """Of one index shard. tops: one an Ask. whole: which of its sampled vectors it holds as their parts have them."""

    tops: list[Top]
    whole: Flags


@dataclass(frozen=True)
class Samples:
    """Ids, int64 [n] ascending, traced back to their parts, and the vectors, float32 [n, dim], found there."""

    ids: Ids
    vectors: Vectors

    @staticmethod
    def none(dim: int) -> Samples:
        return Samples(np.empty(0, np.int64), np.empty((0, dim), np.float32))

    def of(self, shard: IndexShard) -> Samples:
        mine = (self.ids >= shard.first_id) & (self.ids < shard.first_id + shard.rows)
        return Samples(self.ids[mine], self.vectors[mine])


def draw_samples(store: Store, parts: Parts, seed: int) -> Samples:
    """Raises: LedgerError where an id does not lead to a part, a row and the same key in its samples."""
    count = min(CHECKED_IDS, parts.standing)
    drawn = np.sort(np.random.default_rng([seed, count, 2]).choice(parts.standing, count, replace=False))
    ids = parts.ids_at(drawn)
    return Samples(ids, np.stack([origin.vector for origin in trace_parts(store, parts, ids.tolist())]))


def answer(
    store: Store,
    folder: str,
    shard: IndexShard,
    asks: Sequence[Ask],
    queries: Vectors,
    samples: Samples,
    coding: Coding | None,
    among: Selection | None = None,
) -> Answers:
    """What one index shard finds of float32 [q, dim] queries (among what may be found); memory for it until then."""
    index = open_shard(store, folder, shard)
    tops = []
    for each in asks:
        apply(index, each.params)
        tops.append(ask_shard(index, shard, queries, each.depth, among))
    mine = samples.of(shard)
    whole = holds(index, shard, mine)
    if coding and len(mine.ids):
        stored = StoredVectors(store, folder, [shard], coding, queries.shape[1]).take(mine.ids)
        whole &= (stored == decode(coding, encode(coding, mine.vectors))).all(axis=1)
    return Answers(tops, whole)


def score(
    store: Store,
    folder: str,
    shard: IndexShard,
    coding: Coding,
    metric: str,
    queries: Vectors,
    asked: Sequence[Ids],
) -> list[Vectors]:
    """Scores by the stored vectors of those asked for, int64 [q, n] each, that are in one index shard, else NaN."""
    stored = StoredVectors(store, folder, [shard], coding, queries.shape[1])
    end = shard.first_id + shard.rows
    mine = [np.where((ids >= shard.first_id) & (ids < end), ids, -1) for ids in asked]
    return [scores_of(queries, ids, stored, metric) for ids in mine]


def holds(index: Any, shard: IndexShard, samples: Samples) -> Flags:
    """Which of the sampled vectors an index has under their ids, as well as its codes can tell.

    What it has must lie no farther from the vector than the vector's own code does. Kinds of index that cannot
    decode are taken at their word.
    """
    if not len(samples.ids):
        return np.ones(0, bool)
    ivf = faiss.try_extract_index_ivf(index)
    apart = _apart_in_lists if ivf is not None else _apart_in_order
    try:
        found, own = apart(index, shard, samples)
    except (RuntimeError, AttributeError):
        return np.ones(len(samples.ids), bool)
    return np.asarray(found <= own * 1.001 + 1e-4 * np.linalg.norm(samples.vectors, axis=1))


def _apart_in_order(index: Any, shard: IndexShard, samples: Samples) -> tuple[Vectors, Vectors]:
    """Distances of each vector to what the index has of it, and to its own code; ids are in the order of adding."""
    inner = faiss.downcast_index(index.index)
    held = np.stack([inner.reconstruct(int(id) - shard.first_id) for id in samples.ids])
    known = np.array([index.id_map.at(int(id) - shard.first_id) == id for id in samples.ids])
    codec = faiss.downcast_index(inner.storage) if isinstance(inner, faiss.IndexHNSW) else inner
    decoded = codec.sa_decode(codec.sa_encode(samples.vectors))
    return np.where(known, _lengths(held - samples.vectors), np.inf), _lengths(decoded - samples.vectors)


def _apart_in_lists(index: Any, shard: IndexShard, samples: Samples) -> tuple[Vectors, Vectors]:
    """As above, in the space that the inverted lists hold."""
    ivf, vectors = faiss.extract_index_ivf(index), transformed(index, samples.vectors)
    found = np.full(len(vectors), np.inf, np.float32)
    own = np.zeros(len(vectors), np.float32)
    held, codes = np.empty(ivf.d, np.float32), np.empty(ivf.code_size, np.uint8)
    for number, offset, at in _places(ivf, samples.ids):
        vector, lists = np.ascontiguousarray(vectors[at]), np.array([number], np.int64)
        ivf.reconstruct_from_offset(number, offset, faiss.swig_ptr(held))
        found[at] = np.linalg.norm(held - vector)
        ivf.encode_vectors(1, faiss.swig_ptr(vector), faiss.swig_ptr(lists), faiss.swig_ptr(codes))
        ivf.decode_vectors(1, faiss.swig_ptr(codes), faiss.swig_ptr(lists), faiss.swig_ptr(held))
        own[at] = np.linalg.norm(held - vector)
    return found, own


def _places(ivf: Any, ids: Ids) -> Iterable[tuple[int, int, int]]:
    """(inverted list, offset in it, position among `ids`) of ascending ids, by going through the lists once."""
    for number in range(ivf.nlist):
        size = ivf.invlists.list_size(number)
        if size:
            pointer = ivf.invlists.get_ids(number)
            listed = faiss.rev_swig_ptr(pointer, size)
            for offset in np.flatnonzero(np.isin(listed, ids)):
                yield number, int(offset), int(np.searchsorted(ids, listed[offset]))
            ivf.invlists.release_ids(number, pointer)


def _lengths(vectors: Vectors) -> Vectors:
    return np.asarray(np.linalg.norm(vectors, axis=1), np.float32)


def require_whole(store: Store, folder: str, shard: IndexShard, answers: Answers) -> Answers:
    """`answers`, where every sampled id leads back to the vector that was indexed. Raises: IndexBuildError."""
    if not answers.whole.all():
        raise IndexBuildError(
            f"{store.uri(folder)}/{shard.file} holds other vectors under {int((~answers.whole).sum())} of "
            f"{len(answers.whole)} sampled ids than their parts do",
            "An embed run may have replaced parts meanwhile: index again when it is through.",
        )
    return answers


@dataclass(frozen=True)
class Found:
    """What all index shards together found for one Ask, without each query's own id.

    top: by the index's scores. scores: of the same by the stored vectors, None without these. factor: candidates
    for each hit that is re-ranked. exact: `scores`, or without them those of `top`, are of the vectors themselves.
    """

    top: Top
    scores: Vectors | None
    metric: str
    factor: int
    exact: bool

    def figures(self, truth: Top, queries: Queries, depths: Sequence[int] = DEPTHS) -> dict[str, dict[str, float]]:
        """{kind of query: {"recall@k": …, "1-recall@k": …}} as the index alone finds."""
        best = self.top if self.scores is None else Top(self.top.ids, self.scores)
        return self._recalls(dict.fromkeys(depths, best), truth, queries)

    def reranked(self, truth: Top, queries: Queries, depths: Sequence[int] = DEPTHS) -> dict[str, dict[str, float]]:
        """The same of the k best of k × factor candidates; empty without stored vectors."""
        return {} if self.scores is None else self._recalls({k: self._best(k) for k in depths}, truth, queries)

    def _recalls(self, tops: dict[int, Top], truth: Top, queries: Queries) -> dict[str, dict[str, float]]:
        def at(k: int, rows: slice, nearest: int) -> float:
            wanted = Top(truth.ids[rows, :nearest], truth.scores[rows, :nearest])
            return recall_at(k, tops[k].of(rows), wanted, self.metric, self.exact)

        return {
            kind: {
                **{f"recall@{k}": at(k, rows, k) for k in tops},
                **{f"1-recall@{k}": at(k, rows, 1) for k in tops if k > 1},
            }
            for kind, rows in queries.slices().items()
        }

    def _best(self, k: int) -> Top:
        assert self.scores is not None
        wanted = candidates(k, self.factor)
        return rescored(self.top.ids[:, :wanted], self.scores[:, :wanted], k, self.metric)


def merged(answers: Iterable[Answers], asks: Sequence[Ask], metric: str, own: Ids) -> list[Top]:
    """One an Ask, over all index shards, each query's own id taken out."""
    best: list[Top] = []
    for each in answers:
        best = (
            [merge([one, two], ask.depth, metric) for one, two, ask in zip(best, each.tops, asks, strict=True)]
            if best
            else each.tops
        )
    return [without(top, own) for top in best]


def rerank_ms(queries: Vectors, found: Top, stored: StoredVectors, factor: int, metric: str) -> float:
    """Mean milliseconds that re-ranking for 10 neighbours adds to one query, one at a time."""
    started, asked = perf_counter(), 0
    for at in range(min(TIMED_QUERIES, len(queries))):
        rerank(
            queries[at : at + 1], Top(found.ids[at : at + 1, : CURVE_K * factor], found.scores), stored, CURVE_K, metric
        )
        asked = at + 1
        if perf_counter() - started > TIMED_S:
            break
    return round(1e3 * (perf_counter() - started) / max(1, asked), 3)
