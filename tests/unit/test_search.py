import subprocess
import sys
import weakref
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pytest

from pipelines import search as search_module
from pipelines.errors import ConfigError, IndexBuildError, InputError
from pipelines.index import probe
from pipelines.index.add import fill
from pipelines.index.cache import opened_shard
from pipelines.index.choose import cut
from pipelines.index.parts import ReplacedError, embeddings_folder, list_parts
from pipelines.index.release import finish
from pipelines.index.selection import Selection
from pipelines.index.train import train
from pipelines.like import examples
from pipelines.queries import Query
from pipelines.search import Searcher, choose_encoder
from pipelines.storage import Store
from tests.indexed import (
    ENCODER,
    caption_of,
    everything,
    key_of,
    part_name,
    shard_id,
    write_images,
    write_output,
    write_run,
    write_shard,
)
from tests.unit.index.test_parts import FOLDER
from tests.unit.index.test_release import release


@pytest.mark.parametrize("modality", ["image", "text"])
def test_exact_search_needs_no_index(tmp_path: Path, modality: str) -> None:
    store = write_output(tmp_path, parts=3, dtype="float32")
    items, vectors = everything(tmp_path, modality)
    hits = Searcher(store, modality=modality, exact=True).search(vectors[[4, 300]], 5)  # type: ignore[arg-type]
    for at, row in zip((4, 300), hits, strict=True):
        order = np.argsort(-(vectors @ vectors[at]))[:5]
        assert [hit.id for hit in row] == order.tolist()
        assert [(hit.shard, hit.row, hit.caption_index, hit.key) for hit in row] == [
            (items[id].shard, items[id].row, items[id].caption_index, items[id].key) for id in order
        ]
        assert [hit.score for hit in row] == sorted((hit.score for hit in row), reverse=True)
        assert row[0].id == at and row[0].score == pytest.approx(1, abs=1e-5)
        part = int(row[0].shard.split("-")[1])
        assert row[0].captions == [caption_of(part, row[0].row, index) for index in range(len(row[0].captions))]


def test_l2_puts_the_smallest_first(tmp_path: Path) -> None:
    store = write_output(tmp_path, parts=2)
    _, vectors = everything(tmp_path, "image")
    (row,) = Searcher(store, exact=True, metric="l2").search(vectors[[9]], 3)
    assert row[0].id == 9 and row[0].score == pytest.approx(0, abs=1e-5) and row[1].score <= row[2].score


@pytest.mark.parametrize("metric", ["ip", "l2", "cosine", "l1"])
def test_exact_search_takes_any_metric_whatever_the_index_has(tmp_path: Path, metric: str) -> None:
    store = write_release(tmp_path, metric="l2")
    _, vectors = everything(tmp_path, "image")
    searcher = Searcher(store, exact=True, metric=metric)
    (row,) = searcher.search(vectors[[9]], 3)
    assert searcher.metric == metric and row[0].id == 9
    assert row[0].score == pytest.approx(1 if metric in ("ip", "cosine") else 0, abs=1e-3)


def test_a_metric_goes_with_exact_search_only(tmp_path: Path) -> None:
    store = write_release(tmp_path)
    with pytest.raises(ConfigError, match="--metric goes with --exact"):
        Searcher(store, metric="l2")
    with pytest.raises(ConfigError, match="Known: ip, l2, cosine, l1"):
        Searcher(store, exact=True, metric="hamming")


def test_fewer_than_k(tmp_path: Path) -> None:
    store = write_output(tmp_path, parts=1, rows=4)
    (row,) = Searcher(store, exact=True).search(np.ones((1, 16), np.float32), 10)
    assert [hit.id for hit in row] and len(row) == 4


def test_queries_of_another_dimension(tmp_path: Path) -> None:
    searcher = Searcher(write_output(tmp_path, parts=1), exact=True)
    for shape in ((1, 8), (16,)):
        with pytest.raises(ConfigError, match="16 dimensions"):
            searcher.search(np.ones(shape, np.float32))


def test_the_encoder_is_named_or_the_only_one(tmp_path: Path) -> None:
    store = write_output(tmp_path, parts=1)
    assert choose_encoder(store, None) == ENCODER
    with pytest.raises(ConfigError, match=r"no encoder 'nope'\n  It has: " + ENCODER):
        choose_encoder(store, "nope")
    write_output(tmp_path, parts=1, encoder="other")
    with pytest.raises(ConfigError, match=rf"2 encoders: name one with --encoder\n  It has: other, {ENCODER}"):
        choose_encoder(store, None)
    with pytest.raises(InputError, match="vecmill embed"):
        choose_encoder(Store(str(tmp_path / "empty")), None)


def test_without_an_index_only_exact_search_works(tmp_path: Path) -> None:
    with pytest.raises(IndexBuildError, match="--exact"):
        Searcher(write_output(tmp_path, parts=1))


def write_release(
    root: Path,
    parts: int = 4,
    shards: int = 2,
    metric: str = "ip",
    first: int = 0,
    dim: int = 16,
    encoder: str = ENCODER,
) -> Store:
    """An output and a release of its images, in which every search is exact."""
    write_output(root, parts, dim=dim, encoder=encoder, first=first)
    return build_release(root, shards, metric, dim, encoder)


def build_release(
    root: Path, shards: int = 2, metric: str = "ip", dim: int = 16, encoder: str = ENCODER, key: str = "Flat"
) -> Store:
    """A release, of the images that an output has, in which every search is exact where the key leaves it so."""
    store = Store(str(root))
    listed = list_parts(store, embeddings_folder(encoder, "image"))
    faiss.write_index(train(key, metric, np.empty((0, dim), np.float32), dim), str(root / "trained.faiss"))
    made = release("v0001").model_copy(update={"encoder": encoder, "metric": metric, "parts": listed, "index_key": key})
    none = np.empty((0, dim), np.float32)
    runs = [listed.run(run.start, run.stop) for run in cut(listed, shards)]
    filled = [
        fill(store, run, "trained.faiss", f"{made.folder}/shard-{at:04d}.faiss", none, 1, metric)
        for at, run in enumerate(runs)
    ]
    finish(store, made.model_copy(update={"shards": tuple(each.shard for each in filled)}))
    return store


def replace_shard(root: Path, at: int, old: str | None = None) -> None:
    """As an embed run does with a shard that changed: the new part is there, the old one (its name) is not."""
    for folder in (FOLDER, FOLDER.replace("image", "text"), "samples"):
        (root / folder / (old or part_name(at))).unlink()
    write_shard(root, at, 50, 16, 99, "float16", ENCODER, 64, generation=2 if old else 1)


def test_exact_search_compares_with_every_vector_there_is_now(tmp_path: Path) -> None:
    store = write_release(tmp_path, metric="l2")
    replace_shard(tmp_path, 1)
    write_shard(tmp_path, 9, 50, 16, 0, "float16", ENCODER, 64)
    items, vectors = everything(tmp_path, "image")
    searcher = Searcher(store, exact=True)
    assert searcher.metric == "l2"
    for row, item in zip(searcher.search(vectors[::20], 1), items[::20], strict=True):
        assert (row[0].shard, row[0].row) == (item.shard, item.row) and row[0].score == pytest.approx(0, abs=1e-5)


def test_exact_search_gives_the_releases_ids_while_its_parts_stand(tmp_path: Path) -> None:
    store = write_release(tmp_path, parts=2, first=3)
    _, vectors = everything(tmp_path, "image")
    write_shard(tmp_path, 0, 50, 16, 0, "float16", ENCODER, 64)
    found = Searcher(store, exact=True).search(vectors[::20], 1)
    assert [row[0].id for row in found] == list(range(0, len(vectors), 20))


def test_a_release_that_is_named_is_searched_exactly_as_it_was(tmp_path: Path) -> None:
    store = write_release(tmp_path)
    write_shard(tmp_path, 9, 50, 16, 0, "float16", ENCODER, 64)
    assert len(Searcher(store, exact=True, release="v0001").parts.ranges) == 4
    replace_shard(tmp_path, 1)
    with pytest.raises(ReplacedError, match=rf"{part_name(1)} is gone"):
        Searcher(store, exact=True, release="v0001").search(np.ones((1, 16), np.float32))


def test_hits_in_replaced_shards_are_left_out_and_counted(tmp_path: Path) -> None:
    store = write_release(tmp_path)
    _, vectors = everything(tmp_path, "image")
    searcher, said = Searcher(store), []
    whole = searcher.search(vectors[::30], 10, said.append)
    assert said == []
    replace_shard(tmp_path, 1)
    rest = searcher.search(vectors[::30], 10, said.append)
    assert rest == [[hit for hit in row if hit.shard != shard_id(1)] for row in whole]
    left_out = sum(map(len, whole)) - sum(map(len, rest))
    assert left_out > 10 and len(said) == 1
    assert said[0].startswith(f"{left_out} hits were left out") and "`vecmill index` again" in said[0]


def test_hits_without_their_samples_are_left_out_too(tmp_path: Path) -> None:
    store, said = write_release(tmp_path), []
    (tmp_path / "samples" / part_name(2)).unlink()
    (row,) = Searcher(store).search(np.ones((1, 16), np.float32), 1_000, said.append)
    assert {hit.shard for hit in row} == {shard_id(at) for at in (0, 1, 3)}
    assert "188 hits were left out" in said[0]


class Opened:
    """Counts the index shards that are opened, and how many at most are in memory at once."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.alive: list[Any] = []
        self.most = 0
        monkeypatch.setattr(probe, "opened_shard", self.open)

    def open(self, *words: Any) -> Any:
        index = opened_shard(*words)
        self.alive.append(weakref.ref(index))
        self.most = max(self.most, sum(held() is not None for held in self.alive))
        return index


def test_index_shards_stay_in_memory_or_are_opened_one_by_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, opened = write_release(tmp_path, shards=4), Opened(monkeypatch)
    _, vectors = everything(tmp_path, "image")
    searcher = Searcher(store, resident=False)
    found = [searcher.search(vectors[::50]) for _ in range(2)]
    assert (len(opened.alive), opened.most) == (8, 1)
    opened = Opened(monkeypatch)
    searcher = Searcher(store)
    assert [searcher.search(vectors[::50]) for _ in range(2)] == found
    assert (len(opened.alive), opened.most) == (4, 4)


@pytest.mark.parametrize("resident", [True, False])
def test_search_parameters_that_the_index_has_not(tmp_path: Path, resident: bool) -> None:
    store = write_release(tmp_path)
    with pytest.raises(IndexBuildError, match="'nope=8' do not suit the index"):
        Searcher(store, params="nope=8", resident=resident).search(np.ones((1, 16), np.float32))


def test_searching_imports_no_torch() -> None:
    """A service that gets its queries as vectors needs none."""
    code = "import sys, pipelines.search; print('torch' in sys.modules)"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "False"


@pytest.mark.parametrize("exact", [True, False])
def test_only_what_may_be_found_is_found(tmp_path: Path, exact: bool) -> None:
    store = write_release(tmp_path, shards=3)
    items, vectors = everything(tmp_path, "image")
    searcher = Searcher(store, exact=exact, among=lambda parts: Selection.every(parts.rows).without_ranges([(0, 300)]))
    chosen = Selection.only(len(vectors), np.array([5, 299, 310, 311, 700]))
    (row,) = searcher.search(vectors[[299]], 10, among=chosen)
    scores = vectors[[310, 311, 700]] @ vectors[299]
    assert [hit.id for hit in row] == np.array([310, 311, 700])[np.argsort(-scores)].tolist()
    assert [hit.key for hit in row] == [items[hit.id].key for hit in row]
    assert searcher.search(vectors[[299]], 10, among=Selection.none(len(vectors))) == [[]]
    (rest,) = searcher.search(vectors[[299]], len(vectors))
    assert sorted(hit.id for hit in rest) == list(range(300, len(vectors)))


def test_exact_search_opens_no_part_of_which_nothing_may_be_found(tmp_path: Path) -> None:
    store = write_output(tmp_path, parts=3)
    _, vectors = everything(tmp_path, "image")
    searcher = Searcher(store, exact=True)
    (tmp_path / FOLDER / part_name(1)).unlink()
    second = searcher.parts.ranges[1]
    gone = Selection.every(len(vectors)).without_ranges([(second.offset, second.offset + second.rows)])
    assert searcher.nearest(vectors[:1], 5, gone).ids[0, 0] == 0


def test_an_example_is_found_though_another_part_was_replaced(tmp_path: Path) -> None:
    store = write_release(tmp_path)
    replace_shard(tmp_path, 0)
    assert examples(Searcher(store), [Query(like=key_of(2, 3))])[0] is not None
    with pytest.raises(InputError, match="no vector of the key"):
        examples(Searcher(store), [Query(like=key_of(0, 3))])


@pytest.mark.parametrize("exact", [False, True])
def test_no_more_is_asked_for_than_there_is(tmp_path: Path, exact: bool) -> None:
    searcher = Searcher(write_release(tmp_path, parts=2), exact=exact)
    top = searcher.nearest(np.ones((1, 16), np.float32), 10**12, blocks=3)
    assert sorted(top.ids[0].tolist()) == list(range(searcher.parts.rows))


def test_folding_ends_and_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All hits repeat the first: without an end the whole output would be looked at."""
    searcher, said = Searcher(write_release(tmp_path)), list[str]()
    monkeypatch.setattr(search_module, "MOST_TO_FOLD", 50)
    (row,) = searcher.search(np.ones((1, 16), np.float32), 5, said.append, fold=-1.0)
    assert len(row) == 1 and len(row[0].folded) == 49
    assert said == ["Only the 50 nearest were looked at: all others of them repeat those shown."]


def test_pages_of_a_graph_neither_overlap_nor_leave_anything_out(tmp_path: Path) -> None:
    """How far FAISS looks in one depends on efSearch alone, not on how many it is asked for."""
    random = np.random.default_rng(0)
    write_images(tmp_path, 0, random.normal(size=(2_000, 32)))
    write_run(Store(str(tmp_path)), ENCODER, 32, "float16")
    searcher = Searcher(build_release(tmp_path, shards=1, dim=32, key="HNSW16"), params="efSearch=32")
    queries = random.normal(size=(50, 32)).astype(np.float32)
    pages = [searcher.search(queries, 5, offset=5 * page) for page in range(5)]
    listed = [[hit.id for page in pages for hit in page[at]] for at in range(len(queries))]
    assert listed == searcher.nearest(queries, 25).ids.tolist()
    exact = Searcher(searcher.store, exact=True).nearest(queries, 25).ids.tolist()
    assert listed != exact, "it does not look at everything"
