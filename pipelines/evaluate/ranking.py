"""The exact rank of everything relevant among any number of items, in two passes with memory for a tile of scores."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from pipelines.errors import ConfigError
from pipelines.evaluate.items import Items, Tile
from pipelines.evaluate.metrics import MISSING, Ranks, of_whole, ranks_of_counts
from pipelines.index.parts import Ids, Vectors
from pipelines.index.recall import ROUNDING

Flags = NDArray[np.bool_]

FEW = 8
"""Relevant items a query up to which their scores are compared one by one."""
SCORE_BYTES, RELEVANT_BYTES = 16, 64
"""Of a score in a tile with what is made of it, and of a relevant item."""


@dataclass(frozen=True)
class Room:
    """memory_mib: for scores and queries, beside the libraries' own."""

    memory_mib: int = 1024

    @property
    def bytes(self) -> int:
        return self.memory_mib * 2**20

    def tile_rows(self, queries: int, dim: int) -> int:
        """Items whose scores and vectors fit half of it."""
        return int(max(64, min(2**16, self.bytes // 2 // (SCORE_BYTES * max(1, queries) + 8 * dim))))


@dataclass(frozen=True)
class Ranked:
    """The figures of those queries for which something is relevant, which `kept` says of all, bool [q]."""

    figures: dict[str, float]
    kept: Flags
    gallery: int


def exact_figures(queries: Tile, gallery: Items, room: Room, same: bool = False) -> Ranked:
    """Of the exact ranking of the gallery for each query, by inner product; relevant is what has the query's code.

    same: the queries are items of the gallery, and none finds itself. No figures where nothing is relevant.
    """
    relevant, size = count_relevant(queries, gallery)
    relevant -= int(same)
    kept = relevant > 0
    blocks = exact_ranks(queries.of(kept), relevant[kept], gallery, room, same)
    return Ranked(of_whole(blocks) if kept.any() else {}, kept, size - int(same))


def exact_ranks(queries: Tile, relevant: Ids, gallery: Items, room: Room, same: bool = False) -> Iterator[Ranks]:
    """Where each query's relevant items are, in blocks of queries, those with the fewest first.

    relevant: int64 [q], how many there are, at least 1. Scores that differ by less than float32 sums of the same
    vectors do are equal. Raises: ConfigError where the relevant items of one query do not fit the memory.
    """
    order = np.argsort(relevant, kind="stable")
    for block in blocks_of(relevant[order], gallery.dim, room):
        yield _ranks(queries.of(order[block]), relevant[order[block]], gallery, room, same)


def count_relevant(queries: Tile, gallery: Items) -> tuple[Ids, int]:
    """int64 [q]: items of each query's code, and how many items there are."""
    known, inverse = np.unique(queries.codes, return_inverse=True)
    counts, size = np.zeros(len(known), np.int64), 0
    for _, codes in gallery.codes():
        at = np.minimum(np.searchsorted(known, codes), len(known) - 1)
        counts += np.bincount(at[known[at] == codes], minlength=len(known))
        size += len(codes)
    return counts[inverse], size


def blocks_of(relevant: Ids, dim: int, room: Room) -> list[slice]:
    """Runs of queries, by ascending number of relevant items, that fit half of the memory with these.

    Raises: ConfigError where one alone does not.
    """
    most = room.bytes // 2
    needs = (relevant + 1) * RELEVANT_BYTES + 4 * dim + SCORE_BYTES * 64
    if needs.max(initial=0) > most:
        raise ConfigError(
            f"A query has {relevant.max():,} relevant items, more than {room.memory_mib:,} MiB hold",
            f"Give --memory {2 * int(needs.max()) // 2**20 + 1}.",
        )
    starts = [0] if len(relevant) else []
    for at, need in enumerate(needs.tolist()):
        if (at + 1 - starts[-1]) * need > most:
            starts.append(at)
    return [slice(start, stop) for start, stop in pairwise([*starts, len(relevant)])]


def _ranks(queries: Tile, relevant: Ids, gallery: Items, room: Room, same: bool) -> Ranks:
    rows = room.tile_rows(len(queries), gallery.dim)
    least = thresholds(_relevant_scores(queries, relevant, gallery, rows, same), relevant)
    count = _count_few if relevant.max() <= FEW else _count_many
    ahead = np.zeros((len(queries), int(relevant.max()) + 1), np.int64)
    for tile in gallery.tiles(rows):
        scores = queries.vectors @ tile.vectors.T
        _leave_out_relevant(scores, queries.codes, tile.codes)
        count(scores, least, ahead)
    return ranks_of_counts(_sorted_counts(ahead, relevant, count is _count_many), relevant)


def _relevant_scores(queries: Tile, relevant: Ids, gallery: Items, rows: int, same: bool) -> Vectors:
    """float32: the scores of each query's relevant items, one query after the other."""
    starts = np.cumsum(relevant) - relevant
    scores, filled = np.empty(int(relevant.sum()), np.float32), np.zeros(len(queries), np.int64)
    for tile in gallery.tiles(rows):
        near = tile.of(np.isin(tile.codes, queries.codes))
        if not len(near):
            continue
        hits = queries.codes[:, None] == near.codes
        if same:
            hits &= queries.ids[:, None] != near.ids
        of_query = hits.sum(axis=1)
        found = (queries.vectors @ near.vectors.T)[hits]
        place = np.arange(len(found)) - np.repeat(np.cumsum(of_query) - of_query, of_query)
        scores[np.repeat(starts + filled, of_query) + place] = found
        filled += of_query
    return scores


def thresholds(scores: Vectors, relevant: Ids) -> Vectors:
    """float32 [q, most]: each query's, best first, less what rounding may take; inf where it has fewer."""
    table = np.full((len(relevant), int(relevant.max())), np.inf, np.float32)
    table[np.arange(table.shape[1]) < relevant[:, None]] = -scores
    table = -np.sort(table, axis=1)
    least = table - ROUNDING * np.maximum(1, np.abs(table))
    return np.where(np.isinf(table), np.inf, least).astype(np.float32)


def _leave_out_relevant(scores: Vectors, wanted: Ids, codes: Ids) -> None:
    columns = np.flatnonzero(np.isin(codes, wanted))
    if len(columns):
        part = scores[:, columns]
        part[wanted[:, None] == codes[columns]] = -np.inf
        scores[:, columns] = part


def _count_few(scores: Vectors, least: Vectors, ahead: Ids) -> None:
    """Adds to `ahead` [q, most + 1] how many scores are no worse than each threshold."""
    for at in range(least.shape[1]):
        ahead[:, at] += np.count_nonzero(scores >= least[:, at : at + 1], axis=1)


def _count_many(scores: Vectors, least: Vectors, ahead: Ids) -> None:
    """Adds to `ahead` [q, most + 1] how many scores lie between each two thresholds: sums of it are the counts."""
    for row, bounds, counts in zip(scores, least, ahead, strict=True):
        known = bounds[np.isfinite(bounds)][::-1]
        above = np.searchsorted(known, row, side="right")
        counts[: len(known) + 1] += np.bincount(above, minlength=len(known) + 1)


def _sorted_counts(ahead: Ids, relevant: Ids, between: bool) -> Ids:
    """int64 [q, most]: irrelevant items before each relevant one, the best of these first."""
    most = ahead.shape[1] - 1
    within = np.arange(most) < relevant[:, None]
    if not between:
        return np.where(within, ahead[:, :most], MISSING)
    # A score above j of r ascending thresholds comes before the j lowest of the relevant items.
    before = ahead[:, ::-1].cumsum(axis=1)[:, ::-1]
    at = np.where(within, relevant[:, None] - np.arange(most), 0)
    return np.where(within, np.take_along_axis(before, at, axis=1), MISSING)
