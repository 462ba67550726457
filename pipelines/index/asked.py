"""What recall is measured with, kept beside a release so that the next need not read its vectors again."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from pipelines.errors import IndexBuildError
from pipelines.index.arrays import Arrays, put_arrays, read_arrays
from pipelines.index.manifest import KeptFile, Release
from pipelines.index.parts import Parts, Vectors
from pipelines.index.queries import Queries
from pipelines.index.recall import LARGER_IS_NEARER, Top, merge
from pipelines.storage import Store

FILE = "truth.npz"


@dataclass(frozen=True)
class Asked:
    """Queries and the exact nearest of each, its own id among them.

    bounds: float32 [q], the score up to which `truth` is complete. What is farther off than that and not in the
    list is unknown: the list was as long as it may be, or parts that were in it have gone since.
    """

    queries: Queries
    truth: Top
    bounds: Vectors
    metric: str

    @classmethod
    def of(cls, queries: Queries, truth: Top, depth: int, metric: str) -> Asked:
        """truth: of all vectors, `depth` of each query, or all where there are fewer."""
        return cls(queries, truth, _bounds(truth, _never(len(truth.ids), metric), depth), metric)

    def standing(self, parts: Parts) -> Asked:
        """Without what is of parts that are gone: neither queries nor neighbours."""
        kept = ~parts.are_gone(self.queries.own)
        gone = parts.are_gone(self.truth.ids[kept])
        ids = np.where(gone, -1, self.truth.ids[kept])
        last = np.argsort(ids < 0, axis=1, kind="stable")
        scores = np.take_along_axis(self.truth.scores[kept], last, axis=1)
        truth = Top(np.take_along_axis(ids, last, axis=1), scores)
        return Asked(self.queries.where(kept), truth, self.bounds[kept], self.metric)

    def leading(self, queries: Queries) -> Asked:
        """Of `queries`, which begin with its own; of the others nothing is known yet."""
        count, depth = len(queries.vectors) - len(self.bounds), self.truth.ids.shape[1]
        ids = np.concatenate([self.truth.ids, np.full((count, depth), -1)])
        scores = np.concatenate([self.truth.scores, np.zeros((count, depth), np.float32)])
        bounds = np.concatenate([self.bounds, _never(count, self.metric)])
        return Asked(queries, Top(ids, scores), bounds, self.metric)

    def first(self, count: int) -> Asked:
        """Of its queries the first so many."""
        rows, kept = slice(count), np.arange(len(self.bounds)) < count
        return Asked(self.queries.where(kept), self.truth.of(rows), self.bounds[rows], self.metric)

    def with_newer(self, newer: Top, depth: int) -> Asked:
        """newer: the exact nearest among the vectors that have come since, `depth` of each query."""
        found = merge([self.truth, newer], depth, self.metric)
        sign = 1 if self.metric in LARGER_IS_NEARER else -1
        unknown = sign * found.scores < (sign * self.bounds)[:, None]
        truth = Top(np.where(unknown, -1, found.ids), found.scores)
        return Asked(self.queries, truth, _bounds(truth, self.bounds, depth), self.metric)


def _never(count: int, metric: str) -> Vectors:
    return np.full(count, -np.inf if metric in LARGER_IS_NEARER else np.inf, np.float32)


def _bounds(truth: Top, before: Vectors, depth: int) -> Vectors:
    """A list that is full is complete up to its last."""
    if truth.ids.shape[1] < depth:
        return before
    return np.where(truth.ids[:, -1] >= 0, truth.scores[:, -1], before)


def keep_asked(store: Store, folder: str, asked: Asked) -> KeptFile:
    arrays: Arrays = {f"kind_{kind}": vectors for kind, vectors in asked.queries.kinds.items()}
    arrays |= {"own": asked.queries.own, "ids": asked.truth.ids, "scores": asked.truth.scores, "bounds": asked.bounds}
    return put_arrays(store, f"{folder}/{FILE}", {}, arrays)


def read_asked(store: Store, release: Release) -> Asked:
    """Raises: IndexBuildError where the release has none."""
    if release.asked is None:
        raise IndexBuildError(
            f"{release.folder} was built by a version that kept no queries to measure an update with",
            "Run `vecmill index --force` once.",
        )
    _, arrays = read_arrays(store, f"{release.folder}/{release.asked.file}")
    kinds = {name.removeprefix("kind_"): array for name, array in arrays.items() if name.startswith("kind_")}
    truth = Top(arrays["ids"], arrays["scores"])
    return Asked(Queries(kinds, arrays["own"]), truth, arrays["bounds"], release.metric)
