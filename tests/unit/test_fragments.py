"""A fragment's name says what it holds; overlapping fragments make each row once, and a shard only when whole."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from pipelines.fragments import RANGES_PER_FRAGMENT, Fragment, cut, is_whole, pick, ranges_of, shard_rows

ROWS = st.sets(st.integers(0, 60)).map(sorted)
ENDS = st.none() | st.integers(0, 60)
RANGES = st.sets(st.integers(0, 10**9), max_size=2 * RANGES_PER_FRAGMENT).map(
    lambda bounds: tuple(zip(sorted(bounds)[::2], sorted(bounds)[1::2], strict=False))
)
FRAGMENTS = st.lists(ROWS, max_size=5).map(lambda each: [f for rows in each for f in fragments_of(rows, None)])


def fragments_of(rows: list[int], end: int | None) -> list[Fragment]:
    return [Fragment.of(repr(ranges).encode(), ranges, last) for ranges, last in cut(np.array(rows, np.int64), end)]


def rows_of(fragments: list[Fragment]) -> list[int]:
    return [row for fragment in fragments for start, stop in fragment.ranges for row in range(start, stop)]


@given(st.uuids(), RANGES, st.none() | st.integers(0, 10**9))
def test_a_name_says_all_and_fits_a_file_system(
    id_: object, ranges: tuple[tuple[int, int], ...], end: int | None
) -> None:
    fragment = Fragment(id_.hex, ranges, end)  # type: ignore[attr-defined]
    assert Fragment.parse(fragment.name) == fragment
    assert len(fragment.name) <= 255 and "/" not in fragment.name and not fragment.name.endswith(".parquet")


@given(st.text(alphabet="0123456789abcdef.-_endarow \n٣"))
@example("0" * 32 + ".5.arrow")
@example("0" * 32 + ".5-.arrow")
@example("0" * 32 + ".1-2-3.arrow")
@example("0" * 32 + ".1-2__3-4.arrow")
@example("0" * 32 + ".1-2.arrow\n")
@example("0" * 32 + ".1-2.arrow.tmp")
@example("0" * 32 + ".1-2.end.arrow")
@example("a" * 31 + ".1-2.arrow")
def test_another_name_is_no_fragment(name: str) -> None:
    assert Fragment.parse(name) is None


@given(ROWS, ENDS)
@example(list(range(0, 60, 2)), 60)
def test_fragments_hold_the_rows_they_are_made_of(rows: list[int], end: int | None) -> None:
    fragments = fragments_of(rows, end)
    assert rows_of(fragments) == rows
    assert [fragment.end for fragment in fragments if fragment.end is not None] == ([] if end is None else [end])
    assert fragments and all(len(fragment.ranges) <= RANGES_PER_FRAGMENT for fragment in fragments)
    assert len({fragment.id for fragment in fragments}) == len(fragments)


@given(ROWS)
def test_ranges_are_runs_that_do_not_touch(rows: list[int]) -> None:
    ranges = ranges_of(np.array(rows, np.int64))
    assert [row for start, stop in ranges for row in range(start, stop)] == rows
    assert all(stop < start for (_, stop), (start, _) in pairwise(ranges))


@given(FRAGMENTS)
def test_every_covered_row_is_picked_once_in_order_from_one_that_has_it(fragments: list[Fragment]) -> None:
    picked = list(pick(fragments))
    assert [row for _, start, stop in picked for row in range(start, stop)] == sorted(set(rows_of(fragments)))
    for fragment, start, stop in picked:
        assert any(first <= start < stop <= last for first, last in fragment.ranges)


@given(FRAGMENTS, ROWS, ENDS)
def test_a_shard_is_whole_when_every_row_and_the_end_mark_are_there(
    fragments: list[Fragment], rows: list[int], end: int | None
) -> None:
    inside = [row for row in rows if end is None or row < end]
    together = [
        *fragments_of(inside, end),
        *(f for f in fragments if end is None or max(rows_of([f]), default=-1) < end),
    ]
    assert shard_rows(together) == end
    assert is_whole(together) == (end is not None and set(rows_of(together)) == set(range(end)))


@pytest.mark.parametrize("missing", range(10))
def test_one_missing_row_is_not_made_up_for_by_another_twice(missing: int) -> None:
    rows = [row for row in range(10) if row != missing]
    assert not is_whole([*fragments_of(rows, 10), *fragments_of(rows[:1], None)])
    assert is_whole([*fragments_of(rows, 10), *fragments_of([missing], None)])


def test_an_empty_shard_is_whole_by_its_end_mark_alone() -> None:
    assert is_whole(fragments_of([], 0))
    assert not is_whole(fragments_of([], None)) and not is_whole([])
