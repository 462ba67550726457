"""Ranks of streams of items are those of the whole table of scores."""

from __future__ import annotations

import numpy as np
import pytest

from pipelines.errors import ConfigError
from pipelines.evaluate.items import HeldItems, Tile, codes_of, collect, draw
from pipelines.evaluate.metrics import of_whole, ranked
from pipelines.evaluate.ranking import Room, blocks_of, exact_figures, exact_ranks


def tile(count: int, groups: int, seed: int, dim: int = 8) -> Tile:
    """Vectors of small whole numbers: many scores are equal, and all are exact."""
    random = np.random.default_rng(seed)
    vectors = random.integers(-2, 3, (count, dim)).astype(np.float32)
    return Tile(np.arange(count), random.integers(0, groups, count), vectors)


class Tight(Room):
    """So little that queries and items come in many pieces."""

    @property
    def bytes(self) -> int:
        return 48_000

    def tile_rows(self, queries: int, dim: int) -> int:
        return 37


@pytest.mark.parametrize("room", [Room(), Tight()], ids=["roomy", "tight"])
@pytest.mark.parametrize("groups", [3, 40, 300], ids=lambda groups: f"{groups} groups")
@pytest.mark.parametrize("same", [False, True])
def test_ranks_of_a_stream_are_those_of_all_scores(room: Room, groups: int, same: bool) -> None:
    gallery = tile(500, groups, 1)
    queries = gallery.of(np.arange(0, 500, 7)) if same else tile(60, groups, 2)
    scores = queries.vectors @ gallery.vectors.T
    relevant = queries.codes[:, None] == gallery.codes
    if same:
        own = queries.ids[:, None] == gallery.ids
        relevant &= ~own
        scores[own] = -np.inf
    counts = relevant.sum(axis=1)
    kept = np.argsort(counts, kind="stable")[np.sort(counts).searchsorted(1) :]
    blocks = list(exact_ranks(queries.of(kept), counts[kept], HeldItems(gallery), room, same))
    expected = ranked(scores[kept], relevant[kept])
    at = 0
    for block in blocks:
        most = block.found.shape[1]
        assert np.array_equal(block.found, expected.found[at : at + len(block), :most])
        at += len(block)
    assert at == len(kept) and (len(blocks) > 1 or not isinstance(room, Tight) or groups > 40)
    whole = exact_figures(queries, HeldItems(gallery), room, same)
    assert whole.figures == pytest.approx(of_whole([expected]))
    assert whole.kept.tolist() == (counts > 0).tolist() and whole.gallery == 500 - same


def test_rounding_does_not_decide_who_is_first() -> None:
    """A wrong copy of the right vector, off by a float32 sum's rounding, counts as before it."""
    vector = np.full((1, 4), 0.5, np.float32)
    gallery = Tile(np.arange(2), np.array([1, 0]), np.concatenate([vector, vector - np.float32(1e-7)]))
    query = Tile(np.array([9]), np.array([1]), vector)
    assert exact_figures(query, HeldItems(gallery), Room()).figures["mean_rank"] == 2


def test_a_query_that_alone_is_too_much_is_refused_with_what_it_takes() -> None:
    with pytest.raises(ConfigError, match="10,000,000 relevant items") as refused:
        blocks_of(np.array([3, 10_000_000]), 512, Room(64))
    need = int(str(refused.value).split("--memory ")[1].rstrip("."))
    assert blocks_of(np.array([3, 10_000_000]), 512, Room(need)) == [slice(0, 1), slice(1, 2)]


def test_a_draw_is_seeded_uniform_and_whole_where_there_are_fewer() -> None:
    items = HeldItems(tile(1_000, 5, 3))
    ids, total = draw(items, 100, 0)
    assert (len(set(ids.tolist())), total) == (100, 1_000) and (np.diff(ids) > 0).all()
    assert ids.tolist() == draw(items, 100, 0)[0].tolist() != draw(items, 100, 1)[0].tolist()
    assert draw(items, 5_000, 0)[0].tolist() == draw(items, None, 0)[0].tolist() == list(range(1_000))


def test_items_are_collected_and_looked_up_across_tiles() -> None:
    held = tile(300, 9, 4)
    sparse = held.of(held.codes != 0)
    ids = sparse.ids[::11]
    found = collect(HeldItems(sparse), ids, 13)
    assert np.array_equal(found.vectors, held.vectors[ids]) and np.array_equal(found.codes, held.codes[ids])
    asked = np.array([[5, -1, 299], [17, 17, 4]])
    expected = np.where((asked >= 0) & (held.codes[asked] != 0), held.codes[asked], -1)
    assert codes_of(HeldItems(sparse), asked).tolist() == expected.tolist()
