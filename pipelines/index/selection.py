"""Which ids may be found: one bit an id."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import reduce
from typing import Any

import faiss
import numpy as np
from numpy.typing import NDArray

from pipelines.index.parts import Ids, Parts

Bits = NDArray[np.uint8]
Flags = NDArray[np.bool_]

_ONES = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1).sum(axis=1, dtype=np.uint8)


@dataclass(frozen=True, eq=False)
class Selection:
    """A subset of the ids 0 … rows - 1, in memory of rows / 8 bytes (125 MB for a billion).

    bits: uint8 [ceil(rows / 8)], an id's being `bits[id >> 3] >> (id & 7) & 1`, as FAISS's IDSelectorBitmap has
    them; those after the last id are 0. Methods that narrow it leave it as it is and return another.
    """

    bits: Bits
    rows: int

    @classmethod
    def every(cls, rows: int) -> Selection:
        bits = np.full(-(-rows // 8), 0xFF, np.uint8)
        _clear_range(bits, rows, 8 * len(bits))
        return cls(bits, rows)

    @classmethod
    def none(cls, rows: int) -> Selection:
        return cls(np.zeros(-(-rows // 8), np.uint8), rows)

    @classmethod
    def only(cls, rows: int, ids: Ids) -> Selection:
        """ids: int64 [n], in any order; those that are none of the rows are passed over."""
        known = ids[(ids >= 0) & (ids < rows)]
        selection = cls.none(rows)
        np.bitwise_or.at(selection.bits, known >> 3, _bit_of(known))
        return selection

    def without(self, ids: Ids) -> Selection:
        """ids: int64 [n], as for `only`."""
        bits = self.bits.copy()
        _clear(bits, ids[(ids >= 0) & (ids < self.rows)])
        return Selection(bits, self.rows)

    def without_ranges(self, ranges: Iterable[tuple[int, int]]) -> Selection:
        """ranges: (first, stop) of the ids that are denied."""
        bits = self.bits.copy()
        for first, stop in ranges:
            _clear_range(bits, max(first, 0), min(stop, self.rows))
        return Selection(bits, self.rows)

    def __and__(self, other: Selection) -> Selection:
        """What both allow. Of ids that only one of them knows of, none is."""
        rows = min(self.rows, other.rows)
        size = -(-rows // 8)
        return Selection(self.bits[:size] & other.bits[:size], rows)

    def put(self, first: int, flags: Flags) -> None:
        """Says of the ids from `first` on, one a flag, which may be found. Changes this very selection."""
        start, stop = first // 8 * 8, first + len(flags)
        end = min(-(-stop // 8) * 8, self.rows)
        whole = np.concatenate([self.mask(start, first), flags, self.mask(stop, end)])
        self.bits[start // 8 : -(-stop // 8)] = np.packbits(whole, bitorder="little")

    def mask(self, first: int, stop: int) -> Flags:
        """bool [stop - first]: which of these ids may be found; of ids beyond the last, none."""
        packed = self.bits[first // 8 : -(-stop // 8)]
        flags = np.unpackbits(packed, bitorder="little").astype(bool)[first % 8 :][: stop - first]
        return np.pad(flags, (0, stop - first - len(flags)))

    def count(self, first: int, stop: int) -> int:
        """How many of these ids may be found."""
        start, end = -(-first // 8), stop // 8
        if start >= end:
            return int(self.mask(first, stop).sum())
        edges = self.mask(first, 8 * start).sum() + self.mask(8 * end, stop).sum()
        return int(edges) + int(_ONES[self.bits[start:end]].sum(dtype=np.int64))

    @property
    def total(self) -> int:
        return self.count(0, self.rows)

    def selector(self) -> Any:
        """As FAISS takes it in search parameters."""
        return faiss.IDSelectorBitmap(self.bits)

    def of(self, parts: Parts) -> Parts:
        """The parts that hold something that may be found; ids stay."""
        kept = (part for part in parts.ranges if self.count(part.offset, part.offset + part.rows))
        return parts.model_copy(update={"ranges": tuple(kept)})


def end_of(parts: Parts) -> int:
    """One more than the highest id of the parts."""
    return max((part.offset + part.rows for part in parts.ranges), default=0)


def standing(parts: Parts) -> Selection | None:
    """All but what is of parts that are gone; None where none is."""
    return Selection.every(parts.rows).without_ranges(parts.gone) if parts.gone else None


def both(*selections: Selection | None) -> Selection | None:
    """What all allow; None, which is no restriction, where all are."""
    given = [selection for selection in selections if selection is not None]
    return reduce(Selection.__and__, given) if given else None


def _bit_of(ids: Ids) -> Bits:
    return np.left_shift(np.uint8(1), (ids & 7).astype(np.uint8))


def _clear(bits: Bits, ids: Ids) -> None:
    np.bitwise_and.at(bits, ids >> 3, ~_bit_of(ids))


def _clear_range(bits: Bits, first: int, stop: int) -> None:
    start, end = -(-first // 8), stop // 8
    if start >= end:
        return _clear(bits, np.arange(first, stop))
    bits[start:end] = 0
    _clear(bits, np.arange(first, 8 * start))
    _clear(bits, np.arange(8 * end, stop))
