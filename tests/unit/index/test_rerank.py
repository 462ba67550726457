"""Re-ranking: what an index of codes finds is put right by the stored vectors, read by id, here or in a bucket."""

import hashlib
import uuid
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pytest

from pipelines.config import IndexConfig
from pipelines.errors import ConfigError, IndexBuildError
from pipelines.index import rerank as module
from pipelines.index.add import Filled, fill
from pipelines.index.cache import Cache
from pipelines.index.choose import cut
from pipelines.index.manifest import Coding, Rerank
from pipelines.index.parts import list_parts
from pipelines.index.recall import exact, merge, recall_of
from pipelines.index.release import finish
from pipelines.index.rerank import StoredVectors, decode, encode, learn_coding, rerank_dtype, scores_of
from pipelines.index.train import train
from pipelines.search import Searcher
from pipelines.storage import Store
from tests.indexed import everything, write_output
from tests.unit.index.test_parts import FOLDER
from tests.unit.index.test_release import release

KEY, DIM = "OPQ4_16,IVF16,PQ4x4", 16
TRAINED: dict[str, Any] = {}


class Lossy:
    """A release of three index shards of codes, with side files, filled without Ray."""

    def __init__(self, root: Path, dtype: str = "float16", metric: str = "ip", parts_dtype: str = "float16") -> None:
        self.root, self.store = root, write_output(root, parts=7, dtype=parts_dtype)
        self.parts = list_parts(self.store, FOLDER)
        _, self.vectors = everything(root, "image")
        if metric not in TRAINED:
            TRAINED[metric] = train(KEY, metric, self.vectors, DIM)
        faiss.write_index(TRAINED[metric], str(root / "trained.faiss"))
        coding = learn_coding(dtype, self.vectors)
        assert coding
        self.coding = coding
        runs = [self.parts.run(run.start, run.stop) for run in cut(self.parts, 3)]
        self.filled = [self._fill(at, run, metric) for at, run in enumerate(runs)]
        self.shards = [each.shard for each in self.filled]
        self.release = release("v0001").model_copy(
            update={
                "encoder": FOLDER.split("/")[1],
                "metric": metric,
                "parts": self.parts,
                "search_params": "nprobe=16",
                "shards": tuple(self.shards),
                "rerank": Rerank(coding=coding, factor=10, query_ms=0.1),
            }
        )
        finish(self.store, self.release)
        self.queries = self.vectors[3::90] + np.float32(0.02)

    def _fill(self, at: int, run: object, metric: str) -> Filled:
        target = f"{FOLDER.replace('embeddings', 'index')}/v0001/shard-{at:04d}.faiss"
        none = np.empty((0, DIM), np.float32)
        return fill(self.store, run, "trained.faiss", target, none, 1, metric, self.coding)  # type: ignore[arg-type]

    def stored(self, store: Store | None = None) -> StoredVectors:
        return StoredVectors(store or self.store, self.release.folder, self.shards, self.coding, DIM)


@pytest.mark.parametrize("dtype", ["float16", "int8"])
def test_a_side_file_is_a_plain_npy_of_the_vectors_in_id_order(tmp_path: Path, dtype: str) -> None:
    made, seen = Lossy(tmp_path, dtype), []
    for shard in made.shards:
        side = shard.side
        assert side and side.file == shard.file.replace(".faiss", ".npy")
        path = tmp_path / made.release.folder / side.file
        assert path.stat().st_size == side.bytes and hashlib.sha256(path.read_bytes()).hexdigest() == side.sha256
        held = np.load(path)
        assert held.dtype == np.dtype(dtype) and held.shape == (shard.rows, DIM) and side.exact == (dtype == "float16")
        seen.append(decode(made.coding, held))
    np.testing.assert_allclose(np.concatenate(seen), made.vectors, atol=0 if dtype == "float16" else 0.006)


def test_half_of_a_float32_is_not_the_vector_itself(tmp_path: Path) -> None:
    made = Lossy(tmp_path, parts_dtype="float32")
    assert not any(shard.side.exact for shard in made.shards if shard.side)


def test_codes_of_8_bits_cover_what_each_dimension_holds() -> None:
    vectors = np.random.default_rng(0).normal(3, [[0.01, 1, 0, 50]], (500, 4)).astype(np.float32)
    coding = learn_coding("int8", vectors)
    assert coding
    spread = vectors.max(axis=0) - vectors.min(axis=0)
    apart = np.abs(decode(coding, encode(coding, vectors)) - vectors)
    assert (apart <= spread / 254 * 0.51 + 1e-5).all()
    far = encode(coding, vectors * 100)
    assert far.min() >= -127 and far.max() <= 127


@pytest.mark.parametrize("where", ["local", "memory"])
@pytest.mark.parametrize("gap", [0, 10**9])
def test_vectors_are_read_by_id(tmp_path: Path, where: str, gap: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "GAP_BYTES", gap)
    monkeypatch.setattr(module, "SPAN_BYTES", 700)
    monkeypatch.setattr(module, "BATCH_BYTES", 2_000)
    made = Lossy(tmp_path)
    store = made.store
    if where == "memory":
        store = Store(f"memory://{tmp_path.name}-{gap}")
        for path in (tmp_path / made.release.folder).iterdir():
            store.put_atomic(f"{made.release.folder}/{path.name}", path)
    for ids in ([0], [made.parts.rows - 1], [0, 1, 2, 500, 501, 900, made.parts.rows - 1], range(made.parts.rows)):
        wanted = np.array(ids, np.int64)
        np.testing.assert_array_equal(made.stored(store).take(wanted), made.vectors[wanted])


class Ranges(Store):
    """Notes how many bytes each request for ranges brings."""

    asked: list[int]

    def local_path(self, path: str) -> None:
        return None

    def read_ranges(self, path: str, ranges):  # type: ignore[no-untyped-def]
        self.asked.append(sum(stop - start for start, stop in ranges))
        return super().read_ranges(path, ranges)


def test_a_few_vectors_cost_a_few_bytes_and_many_are_read_in_bounded_pieces(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "GAP_BYTES", 0)
    monkeypatch.setattr(module, "SPAN_BYTES", 1_000)
    monkeypatch.setattr(module, "BATCH_BYTES", 4_000)
    made = Lossy(tmp_path)
    store = Ranges(str(tmp_path))
    object.__setattr__(store, "asked", [])
    stored = made.stored(store)
    assert store.asked == []
    stored.take(np.array([5, 300]))
    assert store.asked == [2 * 2 * DIM]
    store.asked.clear()
    stored.take(np.arange(made.parts.rows))
    assert sum(store.asked) == 2 * DIM * made.parts.rows and max(store.asked) <= 5_000


@pytest.mark.parametrize("metric", ["ip", "l2"])
def test_scores_are_those_of_the_vectors(tmp_path: Path, metric: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BATCH_BYTES", 4 * DIM * 50)
    made = Lossy(tmp_path, metric=metric)
    ids = np.random.default_rng(0).integers(-1, made.parts.rows, (len(made.queries), 40))
    scores = scores_of(made.queries, ids, made.stored(), metric)
    for query, row, found in zip(made.queries, ids, scores, strict=True):
        assert np.isnan(found[row < 0]).all()
        theirs = made.vectors[row[row >= 0]]
        expected = theirs @ query if metric == "ip" else ((theirs - query) ** 2).sum(axis=1)
        np.testing.assert_allclose(found[row >= 0], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("metric", ["ip", "l2"])
@pytest.mark.parametrize("dtype", ["float16", "int8"])
def test_search_re_ranks_where_it_can(tmp_path: Path, dtype: str, metric: str) -> None:
    made = Lossy(tmp_path, dtype, metric)
    truth = exact(made.queries, [(0, made.vectors)], 10, metric)
    recall = {
        factor: recall_of(Searcher(made.store, rerank=factor).nearest(made.queries, 10), truth)["recall@10"]
        for factor in (None, 0, 1, 10, 200)
    }
    assert recall[None] == recall[10] > recall[0] + 0.2
    assert recall[1] == recall[0], "the same ten, in another order"
    assert recall[200] == 1 if dtype == "float16" else recall[200] > 0.9
    found = Searcher(made.store).nearest(made.queries, 10)
    if dtype == "float16":
        whole = merge([truth], 10, metric)
        np.testing.assert_allclose(found.scores[:, 0], whole.scores[:, 0], atol=1e-5)


def test_the_nearest_alone_is_sought_among_as_many_candidates_as_ten_are(tmp_path: Path) -> None:
    made = Lossy(tmp_path)
    searcher = Searcher(made.store)
    np.testing.assert_array_equal(searcher.nearest(made.queries, 1).ids, searcher.nearest(made.queries, 10).ids[:, :1])


def test_an_index_without_stored_vectors_is_searched_as_it_is(tmp_path: Path) -> None:
    made = Lossy(tmp_path)
    bare = made.release.model_copy(
        update={
            "version": "v0002",
            "rerank": None,
            "shards": (),
        }
    )
    finish(made.store, bare)
    assert Searcher(made.store).rerank == 0
    with pytest.raises(ConfigError, match="no stored vectors to re-rank with"):
        Searcher(made.store, rerank=5)
    with pytest.raises(ConfigError, match="goes without --exact"):
        Searcher(made.store, rerank=5, exact=True)


def test_a_search_that_has_opened_a_release_goes_on_when_it_is_deleted(tmp_path: Path) -> None:
    made = Lossy(tmp_path)
    searcher = Searcher(made.store)
    before = searcher.nearest(made.queries, 10)
    made.store.delete_folder(made.release.folder)
    after = searcher.nearest(made.queries, 10)
    np.testing.assert_array_equal(before.ids, after.ids)


@pytest.mark.parametrize(("damage", "told"), [("gone", "is gone"), ("cut", "is not what its manifest says")])
def test_a_damaged_side_file_is_refused(tmp_path: Path, damage: str, told: str) -> None:
    made = Lossy(tmp_path)
    path = tmp_path / made.release.folder / "shard-0001.npy"
    data = path.read_bytes()
    path.unlink()
    if damage == "cut":
        path.write_bytes(data[:-1])
    with pytest.raises(IndexBuildError, match=f"shard-0001.npy {told}"):
        Searcher(made.store)
    assert Searcher(made.store, rerank=0).nearest(made.queries, 3).ids.shape == (len(made.queries), 3)


def test_a_remote_side_file_that_goes_meanwhile_says_so(tmp_path: Path) -> None:
    made = Lossy(tmp_path)
    store = Ranges(str(tmp_path))
    object.__setattr__(store, "asked", [])
    stored = made.stored(store)
    made.store.delete_folder(made.release.folder)
    with pytest.raises(IndexBuildError, match="its release was deleted meanwhile"):
        stored.take(np.array([1]))


@pytest.mark.parametrize(
    ("key", "dtype"),
    [
        ("Flat", "none"),
        ("HNSW32", "none"),
        ("IVF16,Flat", "none"),
        ("IVF1024_HNSW32,Flat", "none"),
        ("OPQ8_32,IVF16,PQ8x8", "float16"),
        ("SQ8", "float16"),
        ("PCA8,Flat", "float16"),
    ],
)
def test_vectors_are_stored_where_an_index_holds_codes(key: str, dtype: str) -> None:
    assert rerank_dtype(key, IndexConfig()) == dtype
    assert rerank_dtype(key, IndexConfig(rerank="int8")) == "int8"
    assert rerank_dtype(key, IndexConfig(rerank="none")) == "none"


def test_none_has_no_coding() -> None:
    assert learn_coding("none", np.empty((0, 4), np.float32)) is None
    assert learn_coding("float16", np.empty((0, 4), np.float32)) == Coding(dtype="float16")


def test_a_copy_that_goes_before_it_is_mapped_is_fetched_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = Lossy(tmp_path / "made")
    away, real, left = Store(f"memory://{uuid.uuid4().hex}"), np.memmap, [1]
    for path in made.root.rglob("*"):
        if path.is_file():
            away.put_atomic(str(path.relative_to(made.root)), path)

    def evicted(local: Path, *words: Any) -> Any:
        if left:
            left.pop()
            local.unlink()
        return real(local, *words)

    monkeypatch.setattr(np, "memmap", evicted)
    found = Searcher(away, cache=Cache(tmp_path / "cache", 2**30)).nearest(made.queries, 10)
    assert left == []
    np.testing.assert_array_equal(found.ids, Searcher(made.store).nearest(made.queries, 10).ids)
