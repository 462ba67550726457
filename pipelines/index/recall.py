"""Nearest neighbours found exactly, merged across index shards, and how many of them an index finds."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import faiss
import numpy as np
from numpy.typing import NDArray

from pipelines.index.choose import METRICS
from pipelines.index.parts import Ids, Vectors, unit
from pipelines.index.selection import Selection

DEPTHS = (1, 10, 100)
EXACT_METRICS = ("ip", "l2", "cosine", "l1")
LARGER_IS_NEARER = ("ip", "cosine")
TIES = (16, 512, 16_384)
TIED_BYTES, RESULT_BYTES = 32 * 2**20, 12
"""Of what queries with more equal scores get at once, and of an id with its score."""
ROUNDING = 2e-6
"""Relative difference of two float32 scores of the same vector, as two ways of summing give it."""


@dataclass(frozen=True)
class Top:
    """The best of each query, best first, missing ones with id -1 at the end.

    ids: int64 [queries, k]. scores: float32 [queries, k], inner product, cosine, squared L2 or L1 distance.
    late: bool [queries, k], where some were found only by looking further for want of others, and come after these
    however near they are, so that a longer list begins with the shorter one.
    """

    ids: Ids
    scores: Vectors
    late: NDArray[np.bool_] | None = None

    def of(self, queries: slice) -> Top:
        return Top(self.ids[queries], self.scores[queries], None if self.late is None else self.late[queries])

    def between(self, first: int, stop: int) -> Top:
        """Of each query's the ranks from `first`, counted from 0, to before `stop`."""
        late = None if self.late is None else self.late[:, first:stop]
        return Top(self.ids[:, first:stop], self.scores[:, first:stop], late)

    def replaced(self, queries: Ids, by: Top) -> Top:
        """With what `by` says of these queries, int64 [n]."""
        ids, scores = self.ids.copy(), self.scores.copy()
        ids[queries], scores[queries] = by.ids, by.scores
        if self.late is None and by.late is None:
            return Top(ids, scores)
        late = np.zeros(ids.shape, bool) if self.late is None else self.late.copy()
        late[queries] = False if by.late is None else by.late
        return Top(ids, scores, late)


def merge(tops: Iterable[Top], k: int, metric: str) -> Top:
    """The best k of several, of which no more than two are held; equal scores in order of id, so that the cut into
    shards does not show."""
    rest = iter(tops)
    best = _best_of([next(rest)], k, metric)
    for top in rest:
        best = _best_of([best, top], k, metric)
    return best


def _best_of(found: Sequence[Top], k: int, metric: str) -> Top:
    ids = np.concatenate([top.ids for top in found], axis=1)
    scores = np.concatenate([top.scores for top in found], axis=1)
    if all(top.late is None for top in found):
        return best_first(ids, scores, k, metric)
    late = [np.zeros(top.ids.shape, bool) if top.late is None else top.late for top in found]
    return best_first(ids, scores, k, metric, np.concatenate(late, axis=1))


def best_first(ids: Ids, scores: Vectors, k: int, metric: str, late: NDArray[np.bool_] | None = None) -> Top:
    """The best k of each query's, int64 and float32 [queries, n], in whatever order they are. late: as of Top."""
    worst_last = np.where(ids < 0, np.inf, -scores if metric in LARGER_IS_NEARER else scores)
    keys = (ids, worst_last) if late is None else (ids, worst_last, late | (ids < 0))
    order = np.lexsort(keys, axis=1)[:, :k]
    ids, scores = np.take_along_axis(ids, order, axis=1), np.take_along_axis(scores, order, axis=1)
    return Top(ids, scores, None if late is None else np.take_along_axis(late, order, axis=1))


def with_ties(ask: Callable[[Vectors, int], Top], queries: Vectors, k: int) -> Top:
    """The k best of each query by what gives so many as it is asked for; equal scores in order of id, at the cut too.

    FAISS leaves open which of several equal ones it gives. Where they go on beyond the k-th, those queries are asked
    again for more of them, up to TIES, so many at once that their results fit TIED_BYTES.
    """
    top = ask(queries, k + TIES[0])
    found, tied = top.between(0, k), _tied(top, k, k + TIES[0])
    for wanted in (k + more for more in TIES[1:]):
        still = [tied[:0]]
        step = max(1, TIED_BYTES // (RESULT_BYTES * wanted))
        for some in (tied[at : at + step] for at in range(0, len(tied), step)):
            top = ask(queries[some], wanted)
            found = found.replaced(some, top.between(0, k))
            still.append(some[_tied(top, k, wanted)])
        tied = np.concatenate(still)
    return found


def _tied(top: Top, k: int, asked: int) -> Ids:
    """The queries for which what is equal to the k-th may go on beyond the last; none where that is all there is."""
    if top.ids.shape[1] < asked:
        return np.empty(0, np.int64)
    return np.flatnonzero((top.scores[:, k - 1] == top.scores[:, -1]) & (top.ids[:, -1] >= 0))


def empty_top(queries: int) -> Top:
    return Top(np.empty((queries, 0), np.int64), np.empty((queries, 0), np.float32))


def exact_in_batch(queries: Vectors, first: int, batch: Vectors, k: int, metric: str) -> Top:
    """By brute force among float32 [n, dim] vectors whose ids start at `first`. metric: of EXACT_METRICS."""
    if metric == "cosine":
        queries, batch = unit(queries), unit(batch)
    scores, positions = faiss.knn(queries, batch, min(k, len(batch)), metric=_FAISS[metric])
    return Top(positions.astype(np.int64) + first, scores)


_FAISS = {**METRICS, "cosine": faiss.METRIC_INNER_PRODUCT, "l1": faiss.METRIC_L1}


def exact(
    queries: Vectors, batches: Iterable[tuple[int, Vectors]], k: int, metric: str, among: Selection | None = None
) -> Top:
    """The exact k nearest (among what may be found), in one pass over `batches` with memory for one of them."""
    best = empty_top(len(queries))
    for ids, batch in _allowed(batches, 1, among):
        best = merge([best, _renamed(exact_in_batch(queries, 0, batch, k, metric), ids)], k, metric)
    return best


def _allowed(
    batches: Iterable[tuple[int, Vectors]], count: int, among: Selection | None
) -> Iterator[tuple[Ids, Vectors]]:
    """(int64 ids [n], float32 [n * count, dim]) of what may be found."""
    for first, batch in batches:
        ids = np.arange(first, first + len(batch) // count)
        if among is not None:
            kept = among.mask(first, first + len(ids))
            ids, batch = ids[kept], batch[np.repeat(kept, count)]
        if len(ids):
            yield ids, batch


def _renamed(top: Top, ids: Ids) -> Top:
    return Top(ids[top.ids], top.scores)


def max_similarity(queries: Vectors, first: int, batch: Vectors, count: int, k: int) -> Top:
    """By brute force among items of `count` vectors each, float32 [n * count, dim].

    queries: [q, dim], or [q, several, dim]. The score is the largest inner product of a vector of the one side with
    the other's, as BLIP-2 compares images and texts (https://arxiv.org/abs/2301.12597); where both have several, its
    mean over the query's vectors.
    """
    scores = np.concatenate([_similarities(query, batch, count) for query in queries])
    best = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    return Top(best.astype(np.int64) + first, np.take_along_axis(scores, best, axis=1))


def _similarities(query: Vectors, batch: Vectors, count: int) -> Vectors:
    """float32 [1, n] of one query: one at a time, since a product holds a number for each pair of vectors."""
    products = (query.reshape(-1, query.shape[-1]) @ batch.T).reshape(-1, len(batch) // count, count).max(axis=2)
    scores: Vectors = products.max(axis=0, keepdims=True) if count == 1 else products.mean(axis=0, keepdims=True)
    return scores


def exact_of_several(
    queries: Vectors, batches: Iterable[tuple[int, Vectors]], count: int, k: int, among: Selection | None = None
) -> Top:
    """The k of highest `max_similarity` (among what may be found), in one pass over `batches`."""
    best = empty_top(len(queries))
    for ids, batch in _allowed(batches, count, among):
        best = merge([best, _renamed(max_similarity(queries, 0, batch, count, k), ids)], k, "ip")
    return best


def without(top: Top, own: Ids) -> Top:
    """`top` less each query's own id (int64 [queries], -1 for none), one neighbour shorter."""
    keep = np.argsort(top.ids == own[:, None], axis=1, kind="stable")[:, : top.ids.shape[1] - 1]
    return Top(np.take_along_axis(top.ids, keep, axis=1), np.take_along_axis(top.scores, keep, axis=1))


def recall_of(found: Top, truth: Top, metric: str = "ip", scored: bool = False) -> dict[str, float]:
    """{"recall@k": share of the exact k nearest that are among the k found}, over all queries.

    scored: the found ones' scores are those of the vectors themselves. Then one that is as near as the k-th
    nearest counts as well as that: of equal vectors it does not matter which is found.
    """
    return {f"recall@{k}": recall_at(k, found, truth, metric, scored) for k in DEPTHS}


def recall_at(k: int, found: Top, truth: Top, metric: str = "ip", scored: bool = False) -> float:
    """Of nothing that there is to find, all is found."""
    ids, nearest = found.ids[:, :k], truth.ids[:, :k]
    wanted = (nearest >= 0).sum(axis=1)
    if not wanted.any():
        return 1.0
    counted = np.array([np.isin(theirs[theirs >= 0], mine).sum() for mine, theirs in zip(ids, nearest, strict=True)])
    if scored:
        others = np.array([np.isin(mine, theirs, invert=True) for mine, theirs in zip(ids, nearest, strict=True)])
        near = _as_near(found.scores[:, :k], truth.scores[:, :k], wanted, metric)
        counted += (others & near & (ids >= 0)).sum(axis=1)
    return float(np.minimum(counted, wanted).sum() / wanted.sum())


def _as_near(scores: Vectors, truth: Vectors, wanted: Ids, metric: str) -> NDArray[np.bool_]:
    """Which scores are no worse than each query's last wanted one."""
    last = np.take_along_axis(truth, np.maximum(wanted - 1, 0)[:, None], axis=1)
    allowed = ROUNDING * np.maximum(1, np.abs(last))
    near = scores >= last - allowed if metric in LARGER_IS_NEARER else scores <= last + allowed
    return np.asarray(near & (wanted > 0)[:, None])
