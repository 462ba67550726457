"""How well a ranking finds what is relevant. Every figure is a function of the relevant items' ranks.

A ranking is by score, highest first. Of equal scores what is irrelevant comes first, so that an encoder that gives
everything the same vector gains nothing from luck. Queries for which nothing is relevant are to be left out before.
Definitions: Manning et al., Introduction to Information Retrieval, chapter 8; Järvelin and Kekäläinen, TOIS 2002.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]

DEPTHS = (1, 5, 10)
MISSING = np.iinfo(np.int64).max
"""The rank of what was not found, and of no item at all where a query has fewer relevant ones than another."""


@dataclass(frozen=True)
class Ranks:
    """Where the relevant items of each query are.

    found: int64 [q, most], ascending from 1 in each row, MISSING at the end. relevant: int64 [q], at least 1: how
    many there are.
    """

    found: Ints
    relevant: Ints

    def __len__(self) -> int:
        return len(self.relevant)

    @property
    def first(self) -> Ints:
        """int64 [q]: rank of the first relevant item."""
        return self.found[:, 0] if self.found.shape[1] else np.full(len(self), MISSING)


def ranked(scores: NDArray[np.float32], relevant: NDArray[np.bool_]) -> Ranks:
    """From all scores, [q, n], and which items are relevant, bool [q, n]."""
    order = np.lexsort((relevant, -scores), axis=1)
    return ranks_in_order(np.take_along_axis(relevant, order, axis=1), relevant.sum(axis=1))


def ranks_in_order(hits: NDArray[np.bool_], relevant: Ints) -> Ranks:
    """From which items of each ranking, best first, are relevant, bool [q, k], and how many there are in all."""
    places = np.sort(np.where(hits, np.arange(1, hits.shape[1] + 1), MISSING), axis=1)
    return Ranks(places[:, : int(hits.sum(axis=1).max(initial=0))], relevant.astype(np.int64))


def ranks_of_counts(ahead: Ints, relevant: Ints) -> Ranks:
    """From how many irrelevant items come before each relevant one, int64 [q, most] ascending, MISSING at the end."""
    places = np.arange(1, ahead.shape[1] + 1)
    return Ranks(np.where(ahead == MISSING, MISSING, np.minimum(ahead, MISSING - 1 - places) + places), relevant)


def recall_at_k(ranks: Ranks, k: int) -> float:
    """Share of queries with a relevant item among the first k: Recall@k of image-text retrieval, CMC's rank-k."""
    return float((ranks.first <= k).mean())


def precision_at_k(ranks: Ranks, k: int) -> float:
    """Mean share of relevant ones among the first k."""
    return float((ranks.found <= k).sum(axis=1).mean() / k)


def average_precision(ranks: Ranks, depth: int = MISSING - 1) -> Floats:
    """float64 [q]: mean over the relevant items of the precision at their ranks; 0 for one beyond `depth`.

    The mean is over as many as the first `depth` places can hold.
    """
    precision = np.arange(1, ranks.found.shape[1] + 1) / ranks.found
    held = np.minimum(ranks.relevant, depth)
    return np.asarray(np.where(ranks.found <= depth, precision, 0.0).sum(axis=1) / held)


def mean_average_precision(ranks: Ranks, depth: int = MISSING - 1) -> float:
    return float(average_precision(ranks, depth).mean())


def ndcg_at_k(ranks: Ranks, k: int) -> float:
    """Mean discounted cumulative gain of the first k, as a share of the best possible; gains are 0 and 1."""
    gains = np.where(ranks.found <= k, 1 / np.log2(1.0 + ranks.found), 0.0).sum(axis=1)
    ideal = np.concatenate([[0.0], np.cumsum(1 / np.log2(np.arange(2, k + 2)))])
    return float((gains / ideal[np.minimum(ranks.relevant, k)]).mean())


def at_depths(ranks: Ranks, depths: Sequence[int] = DEPTHS) -> dict[str, float]:
    """Those figures that the first max(depths) of each ranking decide."""
    return {
        **{f"recall@{k}": recall_at_k(ranks, k) for k in depths},
        **{f"precision@{k}": precision_at_k(ranks, k) for k in depths},
        **{f"ndcg@{k}": ndcg_at_k(ranks, k) for k in depths},
        f"map@{max(depths)}": mean_average_precision(ranks, max(depths)),
    }


def of_whole(blocks: Iterable[Ranks], depths: Sequence[int] = DEPTHS) -> dict[str, float]:
    """Every figure, of rankings of everything there is, which come in blocks of queries; one block is held."""
    means: dict[str, float] = {}
    first = [np.empty(0, np.int64)]
    for block in blocks:
        for name, value in {**at_depths(block, depths), "map": mean_average_precision(block)}.items():
            means[name] = means.get(name, 0.0) + len(block) * value
        first.append(block.first)
    ranks = np.concatenate(first)
    means = {name: total / len(ranks) for name, total in means.items()}
    return {**means, "median_rank": float(np.median(ranks)), "mean_rank": float(ranks.mean())}
