"""Queries and their exact nearest, carried from one release to the next without reading a vector again."""

from pathlib import Path

import numpy as np
import pytest

from pipelines.index.asked import Asked, keep_asked, read_asked
from pipelines.index.parts import PartRange, Parts
from pipelines.index.queries import Queries
from pipelines.index.recall import exact
from pipelines.storage import Store
from tests.unit.index.test_release import release

DEPTH, DIM = 12, 8
ROWS = (40, 30, 50)


def parts_of(*gone: int, newer: int = 0) -> Parts:
    sizes = [*ROWS, *[20] * newer]
    starts = np.cumsum([0, *sizes[:-1]])
    ranges = [
        PartRange(name=f"part-{at}.v.0.parquet", offset=int(start), rows=rows, gone=at in gone)
        for at, (start, rows) in enumerate(zip(starts, sizes, strict=True))
    ]
    return Parts(folder="f", dim=DIM, ranges=tuple(ranges))


def vectors(rows: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(rows, DIM)).astype(np.float32)


def first(metric: str, depth: int = DEPTH) -> tuple[Asked, np.ndarray]:
    held = vectors(sum(ROWS), 0)
    own = np.array([3, 45, 70, 119])
    queries = Queries({"image": held[own], "text": vectors(5, 1)}, own)
    return Asked.of(queries, exact(queries.vectors, [(0, held)], depth, metric), depth, metric), held


@pytest.mark.parametrize("metric", ["ip", "l2"])
@pytest.mark.parametrize("gone", [(), (1,), (0, 2)])
def test_what_is_known_is_the_exact_nearest_of_all_that_stands(metric: str, gone: tuple[int, ...]) -> None:
    """Twice over, since what an update leaves unknown stays so in the next."""
    asked, held = first(metric)
    whole = asked
    for seed in (7, 8):
        parts = parts_of(*gone, newer=seed - 7)
        newer = vectors(20, seed)
        added = exact(whole.standing(parts).queries.vectors, [(len(held), newer)], DEPTH, metric)
        whole = whole.standing(parts).with_newer(added, DEPTH)
        held = np.concatenate([held, newer])
        parts_now = np.ones(len(held), bool)
        for part in parts.ranges:
            parts_now[part.offset : part.offset + part.rows] = not part.gone
        ids = np.flatnonzero(parts_now)
        truth = exact(whole.queries.vectors, [(0, held[ids])], DEPTH, metric)
        known = whole.truth.ids >= 0
        np.testing.assert_array_equal(whole.truth.ids[known], ids[truth.ids][known])
        assert (np.diff(known.astype(int), axis=1) <= 0).all() and known[:, 0].mean() > 0.5
        assert known.all() == (not gone)


def test_queries_of_parts_that_are_gone_go_too() -> None:
    asked, _ = first("ip")
    left = asked.standing(parts_of(0))
    assert len(left.queries.kinds["text"]) == 5
    assert left.queries.own.tolist() == [45, 70, 119, -1, -1, -1, -1, -1]
    assert not ((left.truth.ids >= 0) & (left.truth.ids < 40)).any()
    assert "image" not in asked.standing(parts_of(0, 1, 2)).queries.kinds


def test_of_few_vectors_all_is_known() -> None:
    """A list that is not full lacks nothing, so that whatever comes is taken into it."""
    asked, _ = first("l2", depth=500)
    grown = asked.standing(parts_of(1)).with_newer(
        exact(asked.standing(parts_of(1)).queries.vectors, [(120, vectors(9, 2))], 500, "l2"), 500
    )
    assert (np.sort(grown.truth.ids, axis=1)[:, -99:] == [*range(40), *range(70, 129)]).all()


def test_it_is_read_as_it_was_kept(tmp_path: Path) -> None:
    store, (asked, _) = Store(str(tmp_path)), first("ip")
    made = release("v0001")
    kept = keep_asked(store, made.folder, asked.standing(parts_of(2)))
    found = read_asked(store, made.model_copy(update={"asked": kept}))
    assert list(found.queries.kinds) == ["image", "text"] and kept.bytes == store.stat(f"{made.folder}/truth.npz").bytes
    np.testing.assert_array_equal(found.truth.ids, asked.standing(parts_of(2)).truth.ids)
    np.testing.assert_array_equal(found.bounds, asked.standing(parts_of(2)).bounds)
