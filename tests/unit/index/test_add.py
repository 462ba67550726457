"""Sharding an index changes nothing: at full probe its results are those of exact search over the same codes."""

from pathlib import Path

import faiss
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines.errors import IndexBuildError
from pipelines.index.add import fill
from pipelines.index.attempt import Filled
from pipelines.index.choose import cut
from pipelines.index.files import open_shard
from pipelines.index.parts import Parts, list_parts
from pipelines.index.probe import Opening, probe
from pipelines.index.recall import Top, exact, merge
from pipelines.index.train import read_picked, train
from pipelines.index.tune import full_probe
from pipelines.storage import Store
from tests.indexed import everything, part_name, write_output
from tests.unit.index.test_parts import FOLDER

KEYS = [("OPQ4_16,IVF16,PQ4x4", "ip"), ("OPQ4_16,IVF16,PQ4x4", "l2"), ("IVF16_HNSW8,PQ4x4", "l2"), ("Flat", "ip")]


class Built:
    """Four index shards over nine parts, filled without Ray."""

    def __init__(self, root: Path, key: str, metric: str) -> None:
        self.store, self.key, self.metric = write_output(root, parts=9), key, metric
        self.parts = list_parts(self.store, FOLDER)
        _, self.vectors = everything(root, "image")
        self.trained = train(key, metric, self.vectors[::2], self.parts.dim)
        faiss.write_index(self.trained, str(root / "trained.faiss"))
        self.queries = self.vectors[5::100] + 0.01
        self.filled = [self._fill(at, self.parts.run(run.start, run.stop)) for at, run in enumerate(cut(self.parts, 4))]

    def _fill(self, at: int, run: Parts) -> Filled:
        target = f"index/shard-{at:04d}.faiss"
        return fill(self.store, run, "trained.faiss", target, self.queries, 20, self.metric)

    def search(self, k: int) -> Top:
        opening = Opening(self.store, "index", self.key, full_probe(self.key))
        found = [probe(opening, each.shard, self.queries, k) for each in self.filled]
        return merge(found, k, self.metric)


@pytest.mark.parametrize(("key", "metric"), KEYS)
def test_shards_find_what_one_index_of_everything_finds(tmp_path: Path, key: str, metric: str) -> None:
    built = Built(tmp_path, key, metric)
    assert len(built.filled) == 4
    built.trained.add_with_ids(built.vectors, np.arange(len(built.vectors)))
    faiss.ParameterSpace().set_index_parameters(built.trained, full_probe(key))
    scores, ids = built.trained.search(built.queries, 20)
    found = built.search(20)
    np.testing.assert_allclose(found.scores, scores, rtol=1e-4, atol=1e-5)
    whole = merge([Top(ids, scores)], 20, metric)
    settled = np.abs(np.diff(scores, axis=1, prepend=np.inf, append=np.inf)) > 1e-4
    sure = settled[:, :-1] & settled[:, 1:]
    assert sure.mean() > 0.3
    np.testing.assert_array_equal(found.ids[sure], whole.ids[sure])


@pytest.mark.parametrize(("key", "metric"), KEYS)
def test_shards_find_what_brute_force_over_their_codes_finds(tmp_path: Path, key: str, metric: str) -> None:
    built = Built(tmp_path, key, metric)
    indexes = [open_shard(built.store, "index", each.shard) for each in built.filled]
    decoded = np.concatenate(
        [codes_of(index, each.shard.first_id) for index, each in zip(indexes, built.filled, strict=True)]
    )
    assert len(decoded) == built.parts.rows
    truth = exact(built.queries, [(0, decoded)], 20, metric)
    np.testing.assert_allclose(built.search(20).scores, truth.scores, rtol=1e-3, atol=1e-4)


def codes_of(index: faiss.Index, first: int) -> np.ndarray:
    """What the index holds, in id order, decoded to the space of the input."""
    ivf = faiss.try_extract_index_ivf(index)
    if ivf is not None:
        ivf.set_direct_map_type(faiss.DirectMap.Hashtable)
    return np.stack([index.reconstruct(id) for id in range(first, first + index.ntotal)])


def test_the_pass_that_fills_also_finds_the_exact_nearest(tmp_path: Path) -> None:
    built = Built(tmp_path, "Flat", "ip")
    truth = merge([each.truth for each in built.filled], 20, "ip")
    expected = np.argsort(-(built.queries @ built.vectors.T), axis=1)[:, :20]
    np.testing.assert_array_equal(truth.ids[:, :3], expected[:, :3])


def test_every_shard_opens_with_plain_faiss_and_holds_its_ids(tmp_path: Path) -> None:
    built = Built(tmp_path, "Flat", "ip")
    seen = []
    for each in built.filled:
        index = faiss.read_index(str(tmp_path / "index" / each.shard.file))
        assert index.ntotal == each.shard.rows
        seen += faiss.vector_to_array(index.id_map).tolist()
        assert (tmp_path / "index" / each.shard.file).stat().st_size == each.shard.bytes
    assert seen == list(range(built.parts.rows))


@pytest.mark.parametrize("damage", ["cut", "flip", "gone"])
def test_a_damaged_shard_is_refused(tmp_path: Path, damage: str) -> None:
    built = Built(tmp_path, "Flat", "ip")
    shard = built.filled[0].shard
    file = tmp_path / "index" / shard.file
    data = file.read_bytes()
    file.unlink()
    if damage != "gone":
        file.write_bytes(data[:-100] if damage == "cut" else data[:-500] + bytes([data[-500] ^ 1]) + data[-499:])
    with pytest.raises(IndexBuildError, match=shard.file):
        open_shard(Store(str(tmp_path)), "index", shard)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_not_finite_gets_into_no_index(tmp_path: Path, bad: float) -> None:
    store = write_output(tmp_path, parts=3)
    path = tmp_path / FOLDER / part_name(1)
    table = pq.read_table(path)
    column = table["embedding"].combine_chunks()
    numbers = column.flatten().to_numpy(zero_copy_only=False).copy()
    numbers[40] = bad
    at = table.schema.get_field_index("embedding")
    spoilt = pa.FixedSizeListArray.from_arrays(pa.array(numbers), 16).cast(column.type)
    pq.write_table(table.set_column(at, table.schema.field(at), spoilt), path)
    parts = list_parts(store, FOLDER)
    faiss.write_index(train("Flat", "ip", np.empty((0, 16), np.float32), 16), str(tmp_path / "trained.faiss"))
    with pytest.raises(IndexBuildError, match=rf"{part_name(1)} holds vectors that are not finite"):
        fill(store, parts, "trained.faiss", "index/s.faiss", np.empty((0, 16), np.float32), 1, "ip")
    with pytest.raises(IndexBuildError, match=rf"{part_name(1)} holds vectors that are not finite"):
        read_picked(store, parts, [np.arange(part.rows) for part in parts.ranges])
    assert not (tmp_path / "index").exists()


@pytest.mark.parametrize(("key", "metric"), KEYS)
def test_stock_faiss_joins_the_files_and_finds_what_we_find(tmp_path: Path, key: str, metric: str) -> None:
    """`read_index` and `IndexShards`, and nothing of ours."""
    built = Built(tmp_path, key, metric)
    joined = faiss.IndexShards(built.parts.dim, False, False)
    joined.metric_type = {"ip": faiss.METRIC_INNER_PRODUCT, "l2": faiss.METRIC_L2}[metric]
    files = [faiss.read_index(str(file)) for file in sorted((tmp_path / "index").glob("shard-*.faiss"))]
    for index in files:
        faiss.ParameterSpace().set_index_parameters(index, full_probe(key))
        joined.add_shard(index)
    scores, ids = joined.search(built.queries, 20)
    found = built.search(20)
    np.testing.assert_allclose(scores, found.scores, rtol=1e-6)
    # Of equal scores FAISS takes either.
    whole = merge([Top(ids, scores)], 20, metric)
    apart = np.abs(np.diff(scores, axis=1, prepend=np.inf, append=np.inf)) > 0
    sure = apart[:, :-1] & apart[:, 1:]
    assert sure.mean() > 0.5
    np.testing.assert_array_equal(whole.ids[sure], found.ids[sure])
