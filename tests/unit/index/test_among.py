"""Searching among some ids finds all of them that there are to find, in every kind of index that is built."""

from functools import cache
from typing import Any

import faiss
import numpy as np
import pytest

from pipelines.index import among as module
from pipelines.index.among import ask, ask_among
from pipelines.index.choose import empty_index
from pipelines.index.recall import Top, exact, exact_of_several, merge, recall_at, with_ties
from pipelines.index.selection import Selection, both
from pipelines.index.tune import apply

DIM, ROWS, FIRST, K = 16, 3_000, 101, 10
KEYS = [
    ("ip", "Flat"),
    ("ip", "IVF32,Flat"),
    ("ip", "OPQ8_16,IVF32,PQ8x4"),
    ("ip", "OPQ8_16,IVF32_HNSW32,PQ8x4"),
    ("ip", "HNSW32"),
    ("l2", "IVF32_HNSW32,Flat"),
    ("l2", "HNSW32"),
    ("l2", "PCA8,HNSW32"),
    ("l2", "PQ8x4"),
    ("l2", "LSH"),
]


@cache
def made() -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(5)
    vectors = random.normal(size=(ROWS + 8, DIM)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    return vectors[:ROWS], vectors[ROWS:]


@cache
def built(metric: str, key: str) -> Any:
    index = empty_index(key, DIM, metric)
    index.train(made()[0])
    index.add_with_ids(made()[0], np.arange(FIRST, FIRST + ROWS))
    return index


def some(count: int) -> Selection:
    ids = FIRST + np.random.default_rng(count).choice(ROWS, count, replace=False)
    return Selection.only(FIRST + ROWS, ids)


@pytest.mark.parametrize("count", [0, 3, 40, 1_500, ROWS])
@pytest.mark.parametrize(("metric", "key"), KEYS, ids=lambda word: word)
def test_k_allowed_ids_come_where_there_are_k(metric: str, key: str, count: int) -> None:
    index, chosen = built(metric, key), some(count)
    top = ask_among(index, made()[1], K, chosen, FIRST)
    assert top.ids.shape == (8, min(K, count)) if count < ROWS else (8, K)
    for row in top.ids:
        found = row[row >= 0]
        assert len(found) == min(K, count) == len(set(found))
        assert all(chosen.mask(id, id + 1)[0] for id in found.tolist())
    order = np.diff(top.scores, axis=1)
    assert ((order <= 0) if metric == "ip" else (order >= 0)).all()


def test_an_index_that_takes_no_filter_still_finds_nothing_that_is_denied() -> None:
    index = built("l2", "IVF32,PQ8x4,RFlat")
    found = ask_among(index, made()[1], K, some(ROWS // 2), FIRST).ids
    assert (found >= 0).sum() > 40 and np.isin(
        found[found >= 0], some(ROWS // 2).mask(0, FIRST + ROWS).nonzero()[0]
    ).all()


@pytest.mark.parametrize("count", [40, 300, 600, 1_500])
@pytest.mark.parametrize(("metric", "key"), [each for each in KEYS if each[1] in ("Flat", "IVF32,Flat", "HNSW32")])
def test_recall_with_a_filter_is_no_lower_than_without(metric: str, key: str, count: int) -> None:
    vectors, queries = made()
    index, chosen = built(metric, key), some(count)
    if "IVF" in key:
        apply(index, "nprobe=6")
    plain = recall_at(K, ask(index, queries, K), exact(queries, [(FIRST, vectors)], K, metric))
    truth = exact(queries, [(FIRST, vectors)], K, metric, chosen)
    assert recall_at(K, ask_among(index, queries, K, chosen, FIRST), truth) >= (1 if count == 40 else plain - 0.1)
    assert plain > 0.5


def test_a_filter_probes_as_many_more_lists_as_it_denies() -> None:
    """One list of 32 holds few of a thirtieth: asked alone, it gives nearly none of the nearest."""
    vectors, queries = made()
    index, chosen = built("ip", "IVF32,Flat"), some(100)
    params = faiss.SearchParametersIVF(sel=chosen.selector(), nprobe=1)
    apply(index, "nprobe=1")
    truth = exact(queries, [(FIRST, vectors)], K, "ip", chosen)
    narrow = recall_at(K, module._with(index, queries, K, params), truth)
    wide = recall_at(K, ask_among(index, queries, K, chosen, FIRST), truth)
    assert narrow < 0.4 and wide > 0.95
    assert faiss.extract_index_ivf(index).nprobe == 1


def test_search_parameters_hold_where_all_is_allowed() -> None:
    index, every = built("ip", "IVF32,Flat"), Selection.every(FIRST + ROWS)
    for params in ("nprobe=1", "nprobe=32"):
        apply(index, params)
        np.testing.assert_array_equal(ask_among(index, made()[1], K, every, FIRST).ids, ask(index, made()[1], K).ids)


def test_a_filter_that_leaves_whole_lists_empty_is_completed() -> None:
    """What may be found lies all in the lists farthest from the query."""
    vectors, _ = made()
    index = built("ip", "IVF32,Flat")
    apply(index, "nprobe=1")
    query = vectors[:1]
    far = FIRST + np.argsort(vectors @ query[0])[: ROWS // 2]
    chosen = Selection.only(FIRST + ROWS, far)
    found = ask_among(index, query, 1_400, chosen, FIRST).ids
    assert (found >= 0).all() and np.isin(found, far).all()


@pytest.mark.parametrize("metric", ["ip", "l2", "cosine", "l1"])
def test_exact_search_among_some(metric: str) -> None:
    vectors, queries = made()
    chosen = some(25)
    batches = [(FIRST + at, vectors[at : at + 700]) for at in range(0, ROWS, 700)]
    kept = np.flatnonzero(chosen.mask(FIRST, FIRST + ROWS))
    truth = exact(queries, [(0, vectors[kept])], 30, metric)
    found = exact(queries, batches, 30, metric, chosen)
    np.testing.assert_array_equal(found.ids, kept[truth.ids] + FIRST)
    np.testing.assert_allclose(found.scores, truth.scores, rtol=1e-6, atol=1e-6)


def test_exact_search_of_several_vectors_an_item_among_some() -> None:
    vectors, queries = made()
    items = vectors.reshape(-1, 4, DIM)
    chosen = Selection.only(len(items), np.array([7, 8, 400, 749]))
    found = exact_of_several(queries, [(0, vectors[:2_000]), (500, vectors[2_000:])], 4, 10, chosen)
    scores = (items[[7, 8, 400, 749]] @ queries.T).max(axis=1)
    np.testing.assert_array_equal(found.ids, np.array([7, 8, 400, 749])[np.argsort(-scores, axis=0)].T)


@pytest.mark.parametrize("rows", [1, 8, 13, 200])
def test_bits_are_what_was_said_of_each_id(rows: int) -> None:
    random = np.random.default_rng(rows)
    for _ in range(50):
        said = random.random(rows) < 0.5
        first, stop = sorted(random.integers(0, rows + 1, 2).tolist())
        selection = Selection.only(rows, np.flatnonzero(said))
        np.testing.assert_array_equal(selection.mask(0, rows), said)
        np.testing.assert_array_equal(selection.mask(first, stop), said[first:stop])
        assert selection.count(first, stop) == said[first:stop].sum() and selection.total == said.sum()
        put = Selection.none(rows)
        put.put(first, said[first:stop])
        np.testing.assert_array_equal(put.mask(0, rows)[first:stop], said[first:stop])
        assert put.total == said[first:stop].sum()
        denied = selection.without_ranges([(first, stop)])
        np.testing.assert_array_equal(denied.mask(0, rows), said & ~np.isin(np.arange(rows), np.arange(first, stop)))
        assert selection.without(np.arange(first, stop)).total == denied.total
        assert Selection.every(rows).without(np.array([0, 0, rows, -1, rows + 9])).total == rows - 1
        assert (selection & put).total == put.total
        chosen = selection.selector()
        assert [chosen.is_member(id) for id in range(rows + 9)] == [*said.tolist(), *[False] * 9]


def test_no_selections_are_no_restriction() -> None:
    assert both() is None and both(None, None) is None
    one, two = Selection.only(9, np.array([1, 2])), Selection.only(9, np.array([2, 8]))
    assert both(one, None) is one
    narrowed = both(one, None, two)
    assert narrowed is not None and narrowed.mask(0, 9).nonzero()[0].tolist() == [2]


@pytest.mark.parametrize("share", [0.03, 0.1, 0.5])
@pytest.mark.parametrize("shards", [1, 3])
def test_pages_of_an_ivf_neither_overlap_nor_leave_anything_out(share: float, shards: int) -> None:
    """The lists that are probed run out on some page: what the others hold comes after, whatever its score."""
    random = np.random.default_rng(7)
    centres, of = random.normal(size=(40, DIM)), random.integers(0, 40, ROWS)
    vectors = (centres[of] + 0.5 * random.normal(size=(ROWS, DIM))).astype(np.float32)
    chosen = Selection.only(ROWS, np.flatnonzero(random.random(ROWS) < share))
    indexes = []
    for ids in np.array_split(np.arange(ROWS), shards):
        index = empty_index("IVF64,Flat", DIM, "ip")
        index.train(vectors)
        index.add_with_ids(vectors[ids], ids)
        apply(index, "nprobe=1")
        indexes.append((index, int(ids[0])))
    queries = vectors[:20]

    def nearest(k: int) -> np.ndarray:
        def asked(queries: np.ndarray, count: int) -> Top:
            found = (ask_among(index, queries, count, chosen, first) for index, first in indexes)
            return merge(found, count, "ip")

        return with_ties(asked, queries, k).between(0, k).ids

    pages = [nearest(10 * page)[:, 10 * (page - 1) :] for page in range(1, 13)]
    whole = nearest(120)
    for row in range(len(queries)):
        paged = [id for page in pages for id in page[row] if id >= 0]
        assert len(paged) == len(set(paged)) == min(120, chosen.total)
        assert paged == [id for id in whole[row] if id >= 0]
