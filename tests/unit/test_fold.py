from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines.fold import fold
from pipelines.index.recall import Top, with_ties
from pipelines.index.rerank import rerank_in_blocks
from pipelines.search import Hit, Searcher
from tests.indexed import everything, write_output
from tests.unit.index.test_parts import FOLDER
from tests.unit.index.test_rerank import Lossy


def hit(id: int, vector: list[float], row: int | None = None, sha256: str | None = None) -> Hit:
    where = {"uri": "a.tar", "offset": None, "length": None, "row_group": None}
    return Hit(
        id=id,
        part="p",
        position=id,
        shard="s",
        row=id if row is None else row,
        caption_index=None,
        key=str(id),
        vector=np.array(vector, np.float32),
        sha256=sha256,
        captions=[],
        label=None,
        metadata=None,
        score=1.0 - id / 100,
        **where,  # type: ignore[arg-type]
    )


def ids(hits: list[Hit]) -> list[tuple[int, list[int]]]:
    return [(each.id, [under.id for under in each.folded]) for each in hits]


def test_what_repeats_a_better_hit_is_folded_under_it() -> None:
    hits = [
        hit(0, [1, 0]),
        hit(1, [0, 2]),
        hit(2, [9, 0.1]),
        hit(3, [0.7, 0.7], sha256="a"),
        hit(4, [-1, 0], sha256="a"),
        hit(5, [-1, 0.01], row=1),
        hit(6, [-1, 0]),
    ]
    assert ids(fold(hits, 0.99)) == [(0, [2]), (1, [5]), (3, [4]), (6, [])]
    assert ids(fold(hits, 1.0)) == [(0, []), (1, [5]), (2, []), (3, [4]), (6, [])]
    assert [lead for lead, _ in ids(fold(hits[:4], 0.99))] == [0, 1, 3]
    assert fold([], 0.9) == []


def repeat(root: Path, part: int, times: int) -> None:
    """Every vector of a part so many times over, next to each other, as its first of these."""
    path = sorted((root / FOLDER).glob("*.parquet"))[part]
    table = pq.read_table(path)
    at = table.schema.get_field_index("embedding")
    same = table["embedding"].take(pa.array([row // times * times for row in range(len(table))]))
    pq.write_table(table.set_column(at, table.schema.field(at), same), path, row_group_size=64)


@pytest.mark.parametrize("exact", [True, False])
def test_k_folded_hits_come_until_there_are_no_more(tmp_path: Path, exact: bool) -> None:
    store = write_output(tmp_path, parts=3)
    for part in range(3):
        repeat(tmp_path, part, 20)
    store = store if exact else release_of(tmp_path)
    _, vectors = everything(tmp_path, "image")
    searcher = Searcher(store, exact=exact)
    (row,) = searcher.search(vectors[:1], 5, fold=0.999)
    assert len(row) == 5 and len(row[0].folded) == 19
    (every,) = searcher.search(vectors[:1], 50, fold=0.999)
    assert sum(1 + len(each.folded) for each in every) == len(vectors)
    (later,) = searcher.search(vectors[:1], 5, fold=0.999, offset=5)
    assert [each.id for each in row + later] == [each.id for each in every[:10]]


def test_captions_of_one_sample_fold(tmp_path: Path) -> None:
    store = write_output(tmp_path, parts=2)
    _, vectors = everything(tmp_path, "text")
    (row,) = Searcher(store, modality="text", exact=True).search(vectors[[10]], 8, fold=1)
    assert len(row) == 8 == len({(each.shard, each.row) for each in row}) == 8
    assert all((under.shard, under.row) == (each.shard, each.row) for each in row for under in each.folded)


def pages(searcher: Searcher, queries: np.ndarray, k: int, upto: int) -> list[list[int]]:
    found = [searcher.search(queries, k, offset=offset) for offset in range(0, upto, k)]
    return [[each.id for page in found for each in page[at]] for at in range(len(queries))]


@pytest.mark.parametrize("exact", [True, False])
def test_pages_follow_on_with_equal_scores_in_order_of_id(tmp_path: Path, exact: bool) -> None:
    store = write_output(tmp_path, parts=3)
    for part in range(3):
        repeat(tmp_path, part, 100)
    store = store if exact else release_of(tmp_path)
    _, vectors = everything(tmp_path, "image")
    queries = vectors[[0, 200, 400]]
    searcher = Searcher(store, exact=exact)
    scores = queries @ vectors.T
    for row, mine in zip(pages(searcher, queries, 7, 140), scores, strict=True):
        assert row == np.lexsort((np.arange(len(mine)), -mine.round(5)))[:140].tolist()


def release_of(root: Path) -> object:
    """Of parts that are there already."""
    import faiss

    from pipelines.index.add import fill
    from pipelines.index.parts import list_parts
    from pipelines.index.release import finish
    from pipelines.index.train import train
    from pipelines.storage import Store
    from tests.unit.index.test_release import release

    store = Store(str(root))
    listed = list_parts(store, FOLDER)
    none = np.empty((0, 16), np.float32)
    faiss.write_index(train("Flat", "ip", none, 16), str(root / "trained.faiss"))
    made = release("v0001").model_copy(update={"encoder": FOLDER.split("/")[1], "parts": listed})
    runs = [listed.run(0, 1), listed.run(1, 3)]
    filled = [
        fill(store, run, "trained.faiss", f"{made.folder}/shard-{at:04d}.faiss", none, 1, "ip")
        for at, run in enumerate(runs)
    ]
    finish(store, made.model_copy(update={"shards": tuple(each.shard for each in filled)}))
    return store


def test_pages_of_re_ranked_hits_neither_overlap_nor_leave_out(tmp_path: Path) -> None:
    made = Lossy(tmp_path)
    searcher = Searcher(made.store)
    top = searcher.nearest(made.queries, 10, blocks=6)
    for row in top.ids:
        assert len(set(row.tolist())) == 60 and (row >= 0).all()
    assert pages(searcher, made.queries, 10, 60) == top.ids.tolist()
    assert pages(searcher, made.queries, 10, 10) == searcher.nearest(made.queries, 10).ids.tolist()
    whole = searcher.nearest(made.queries, 10, blocks=132)
    assert all(sorted(row[row >= 0].tolist()) == list(range(made.parts.rows)) for row in whole.ids)
    assert rerank_in_blocks(
        made.queries,
        Top(whole.ids[:, :0], whole.scores[:, :0]),
        searcher._stored,
        3,
        5,
        2,
        "ip",  # type: ignore[arg-type]
    ).ids.shape == (len(made.queries), 0)


def test_an_offset_need_not_be_a_multiple_of_k(tmp_path: Path) -> None:
    made = Lossy(tmp_path)
    searcher = Searcher(made.store)
    whole = searcher.nearest(made.queries, 10, blocks=3).ids
    found = searcher.search(made.queries, 10, offset=13)
    assert [[each.id for each in row] for row in found] == whole[:, 13:23].tolist()
    assert searcher.search(made.queries, 10, offset=100_000) == [[] for _ in made.queries]


def test_more_is_asked_for_while_scores_are_equal_at_the_cut() -> None:
    scores = np.array([[3.0] * 5 + [2.0] * 40 + [1.0] * 400], np.float32)
    asked: list[int] = []
    query = np.zeros((1, 1), np.float32)

    def ask(_: np.ndarray, count: int) -> Top:
        asked.append(count)
        order = np.random.default_rng(count).permutation(445)
        order = order[np.argsort(-scores[0][order], kind="stable")][:count]
        best = np.lexsort((order, -scores[0][order]))
        return Top(order[best][None].astype(np.int64), scores[:, order[best]])

    assert with_ties(ask, query, 5).ids.tolist() == [list(range(5))] and asked == [21]
    assert with_ties(ask, query, 20).ids.tolist() == [list(range(20))] and asked[1:] == [36, 532]
    assert with_ties(ask, query, 445).ids.tolist() == [list(range(445))]
