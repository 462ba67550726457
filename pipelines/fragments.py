"""Fragments of a shard: what each write leaves in staging, and when together they are the whole shard.

Block boundaries differ from run to run, so fragments of two attempts overlap: coverage is the union
of exact row sets, never a sum of counts. A fragment's name says what rows it holds, so that coverage
is judged from a listing alone.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Range = tuple[int, int]
"""Half-open: (first row, row after the last)."""

RANGES_PER_FRAGMENT = 8
_SPANS = r"(?:\d+-\d+(?:_\d+-\d+)*)?"
_NAME = re.compile(rf"(?P<id>[0-9a-f]{{32}})\.(?P<ranges>{_SPANS})(?:\.end(?P<end>\d+))?\.arrow", re.ASCII)


@dataclass(frozen=True)
class Fragment:
    """Rows of one shard, and its number of rows where the end mark was among them. id: digest of its bytes."""

    id: str
    ranges: tuple[Range, ...]
    end: int | None

    @staticmethod
    def of(data: bytes, ranges: tuple[Range, ...], end: int | None) -> Fragment:
        return Fragment(_digest(data), ranges, end)

    def is_of(self, data: bytes) -> bool:
        """Whether these are its bytes, whole and as they were put."""
        return _digest(data) == self.id

    @property
    def name(self) -> str:
        spans = "_".join(f"{start}-{stop}" for start, stop in self.ranges)
        return f"{self.id}.{spans}{'' if self.end is None else f'.end{self.end}'}.arrow"

    @staticmethod
    def parse(name: str) -> Fragment | None:
        """None where the name is not a fragment's."""
        found = _NAME.fullmatch(name)
        if not found:
            return None
        spans = [span.split("-") for span in found["ranges"].split("_") if span]
        ranges = tuple((int(start), int(stop)) for start, stop in spans)
        return Fragment(found["id"], ranges, int(found["end"]) if found["end"] else None)


def _digest(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=16).hexdigest()


def cut(rows: NDArray[np.int64], end: int | None) -> list[tuple[tuple[Range, ...], int | None]]:
    """Ranges and end mark of the fragments for int64 `rows` (sorted, distinct): one, or more where the rows are
    so scattered that a name could not list them."""
    ranges = ranges_of(rows)
    chunks = [ranges[at : at + RANGES_PER_FRAGMENT] for at in range(0, len(ranges), RANGES_PER_FRAGMENT)] or [[]]
    return [(tuple(chunk), end if position == 0 else None) for position, chunk in enumerate(chunks)]


def ranges_of(rows: NDArray[np.int64]) -> list[Range]:
    """Runs of consecutive numbers in sorted, distinct int64 `rows`."""
    if not len(rows):
        return []
    breaks = np.flatnonzero(np.diff(rows) != 1) + 1
    return [(int(run[0]), int(run[-1]) + 1) for run in np.split(rows, breaks)]


def shard_rows(fragments: Iterable[Fragment]) -> int | None:
    """The shard's number of rows, None while no fragment holds its end mark."""
    return next((fragment.end for fragment in fragments if fragment.end is not None), None)


def is_whole(fragments: list[Fragment]) -> bool:
    """Whether the fragments hold every row of the shard, and its end mark."""
    rows = shard_rows(fragments)
    return rows is not None and sum(stop - start for _, start, stop in pick(fragments)) == rows


def pick(fragments: Iterable[Fragment]) -> Iterator[tuple[Fragment, int, int]]:
    """(fragment, start, stop) in row order, every covered row exactly once."""
    spans = sorted((start, stop, fragment.name, fragment) for fragment in fragments for start, stop in fragment.ranges)
    reached = 0
    for start, stop, _, fragment in spans:
        if stop > reached:
            yield fragment, max(start, reached), stop
            reached = stop
