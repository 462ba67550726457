"""The index from end to end on a real Ray: parts in, a release out, and every id back to where it came from."""

import io
import os
import re
import subprocess
import sys
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray

from pipelines.config import IndexConfig
from pipelines.errors import ConfigError, IndexBuildError
from pipelines.index.add import results
from pipelines.index.build import build_index
from pipelines.index.current import current_version
from pipelines.index.files import open_shard
from pipelines.index.manifest import Release
from pipelines.index.publish import NotPublishedError, list_releases, publish, rollback
from pipelines.index.recall import exact, recall_at
from pipelines.index.release import read_release
from pipelines.index.trace import trace
from pipelines.index.tune import full_probe
from pipelines.search import Searcher
from pipelines.storage import Store
from tests.indexed import ENCODER, everything, part_name, write_output, write_shard
from tests.unit.index.test_parts import damage

DIM = 32


def make_equal(path: Path) -> None:
    """A part whose vectors are all its first."""
    table = pq.read_table(path)
    at = table.schema.get_field_index("embedding")
    same = table["embedding"].take(pa.array([0] * len(table)))
    pq.write_table(table.set_column(at, table.schema.field(at), same), path)


# Fewer queries and a short target only keep the tests quick.
QUICK = {"recall_queries": 100, "max_query_ms": 0.5, "floor": 0.0}
SETTINGS = IndexConfig(index_key="OPQ8_32,IVF32,PQ8x4", shards=4, train_vectors=4_000, **QUICK)
PARTS, ROWS = 30, 1_150


VECTORS = tracemalloc.DomainFilter(True, np.lib.tracemalloc_domain)
ARROW_BEFORE = 0


@dataclass(frozen=True)
class Metered(Store):
    """A store that writes down, in every process that reads through it, the bytes that NumPy and Arrow
    hold there since its first object was opened: a line as each object is opened, and one when the
    process lets go of the store. What a step keeps of the parts before is held as the next is opened."""

    log: str = ""

    def open(self, path: str) -> io.BufferedReader:
        global ARROW_BEFORE
        if not tracemalloc.is_tracing():
            ARROW_BEFORE = pa.total_allocated_bytes()
            tracemalloc.start()
        self.note(path)
        return super().open(path)

    def note(self, what: str) -> None:
        arrays = tracemalloc.take_snapshot().filter_traces([VECTORS]).traces
        held = sum(trace.size for trace in arrays) + pa.total_allocated_bytes() - ARROW_BEFORE
        with Path(self.log).open("a") as log:
            log.write(f"{os.getpid()} {held} {what}\n")

    def __del__(self) -> None:
        if tracemalloc.is_tracing():
            self.note("done")
            tracemalloc.stop()

    def peaks(self) -> dict[int, int]:
        """Bytes, by process."""
        found: dict[int, int] = {}
        for line in Path(self.log).read_text().splitlines():
            pid, held, _ = line.split(" ", 2)
            found[int(pid)] = max(found.get(int(pid), 0), int(held))
        return found


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("output")
    write_output(root, PARTS, ROWS, DIM, row_group=500)
    return root


@pytest.fixture(scope="module")
def release(ray_local: None, output: Path) -> Release:
    return build_index(Store(str(output)), ENCODER, "text", SETTINGS)


def test_the_release_is_whole(output: Path, release: Release) -> None:
    items, _ = everything(output, "text")
    assert len(items) == release.parts.rows >= 50_000
    assert (release.index_key, release.metric, release.parts.dim) == (SETTINGS.index_key, "ip", DIM)
    assert len(release.shards) == 4 and sum(shard.rows for shard in release.shards) == len(items)
    assert read_release(Store(str(output)), ENCODER, "text") == release
    assert release.search_params.startswith("nprobe=")
    figures = release.recall.figures["text"]
    assert release.recall.queries == {"text": 100, "image": 100} and 0 < figures["recall@100"] <= 1
    assert set(release.seconds) == set(release.peak_mib) == {"read", "train", "add", "tune", "recall"}
    assert not [path for path in (output / "staging").rglob("*") if path.is_file()]
    files = sorted(path.name for path in (output / release.folder).iterdir())
    shards = [f"shard-{at:04d}.{suffix}" for at in range(4) for suffix in ("faiss", "npy")]
    assert files == ["build.json", "curve.svg", "manifest.json", "report.md", *shards, "trained.faiss", "truth.npz"]


def test_every_id_leads_back_to_its_key_and_vector(output: Path, release: Release) -> None:
    store = Store(str(output))
    items, vectors = everything(output, "text")
    held: list[int] = []
    for shard in release.shards:
        index = open_shard(store, release.folder, shard)
        ivf = faiss.extract_index_ivf(index)
        for number in range(ivf.nlist):
            size = ivf.invlists.list_size(number)
            held += faiss.rev_swig_ptr(ivf.invlists.get_ids(number), size).tolist() if size else []
    assert sorted(held) == list(range(len(items)))
    for origin, item, vector in zip(trace(store, release, range(len(items))), items, vectors, strict=True):
        assert (origin.shard, origin.row, origin.caption_index, origin.key) == (
            item.shard,
            item.row,
            item.caption_index,
            item.key,
        )
        assert (origin.vector == vector).all()


def test_an_id_is_the_vector_it_was_added_as(output: Path, release: Release) -> None:
    """Decoded codes lie nearer their own vector than those of any other of 400, nearly always."""
    store = Store(str(output))
    _, vectors = everything(output, "text")
    for shard in release.shards:
        index = open_shard(store, release.folder, shard)
        faiss.extract_index_ivf(index).set_direct_map_type(faiss.DirectMap.Hashtable)
        ids = np.random.default_rng(1).choice(shard.rows, 400, replace=False) + shard.first_id
        codes = np.stack([index.reconstruct(int(id)) for id in ids])
        apart = ((codes[:, None] - vectors[ids][None]) ** 2).sum(-1)
        assert (apart.argmin(axis=1) == np.arange(400)).mean() > 0.7


def test_full_probe_equals_exact_search_over_the_codes(output: Path, release: Release) -> None:
    store = Store(str(output))
    _, vectors = everything(output, "text")
    queries = vectors[::5_000]
    codes = np.empty_like(vectors)
    for shard in release.shards:
        index = open_shard(store, release.folder, shard)
        faiss.extract_index_ivf(index).set_direct_map_type(faiss.DirectMap.Hashtable)
        for id in range(shard.first_id, shard.first_id + shard.rows):
            codes[id] = index.reconstruct(id)
    found = Searcher(store, modality="text", params=full_probe(release.index_key), rerank=0).nearest(queries, 50)
    scores = queries @ codes.T
    np.testing.assert_allclose(found.scores, -np.sort(-scores, axis=1)[:, :50], atol=1e-4)
    np.testing.assert_allclose(np.take_along_axis(scores, found.ids, axis=1), found.scores, atol=1e-4)


def test_re_ranking_is_measured_reported_and_on_by_default(output: Path, release: Release) -> None:
    alone, reranked = release.recall.figures["text"], release.recall.reranked["text"]
    assert all(reranked[name] >= alone[name] for name in alone) and reranked["recall@10"] > alone["recall@10"] + 0.1
    assert release.rerank and release.rerank.factor == 10 and release.rerank.query_ms > 0
    assert release.bytes_per_vector["rerank"] == pytest.approx(2 * DIM, rel=0.02)
    assert release.search_params in [point.search_params for point in release.curve] and len(release.curve) >= 2
    assert all(point.reranked["text"] > point.recall["text"] and point.query_ms > 0 for point in release.curve)
    assert release.round_trips == 64 and release.batch_query_ms > 0
    report = (output / release.folder / "report.md").read_text()
    assert f"{release.batch_query_ms:.2f} of 32 at once" in report
    assert f"{reranked['recall@10']:.3f}" in report and all(point.search_params in report for point in release.curve)
    searcher = Searcher(Store(str(output)), modality="text")
    _, vectors = everything(output, "text")
    truth = exact(vectors[::5_000], [(0, vectors)], 10, "ip")
    found = recall_at(10, searcher.nearest(vectors[::5_000], 10), truth)
    assert searcher.rerank == 10 and found > recall_at(
        10, Searcher(Store(str(output)), modality="text", rerank=0).nearest(vectors[::5_000], 10), truth
    )


def test_search_finds_a_vector_and_its_caption(output: Path, release: Release) -> None:
    items, vectors = everything(output, "text")
    hits = Searcher(Store(str(output)), modality="text", exact=True).search(vectors[[12_345]], 3)
    assert (hits[0][0].key, hits[0][0].caption_index) == (items[12_345].key, items[12_345].caption_index)
    assert hits[0][0].caption == hits[0][0].captions[hits[0][0].caption_index or 0]


def test_no_step_holds_all_parts(ray_local: None, output: Path, tmp_path: Path) -> None:
    total = everything(output, "text")[1].nbytes
    store = Metered(str(output), log=str(tmp_path / "held"))
    settings = SETTINGS.model_copy(
        update={"shards": 2, "train_vectors": 3_000, "recall_queries": 20, "target_recall": 0.4}
    )
    built = build_index(store, ENCODER, "text", settings, force=True)
    assert built.recall.reranked["text"]["recall@10"] >= 0.4
    Searcher(store, modality="text", exact=True).nearest(np.ones((2, DIM), np.float32), 10)
    store.note("searched")
    tracemalloc.stop()
    peaks = store.peaks()
    assert len(peaks) >= 2 and os.getpid() in peaks
    assert max(peaks.values()) < total / 4, f"{peaks} bytes held at once, of {total} in all parts"
    assert min(peaks.values()) > 0


def test_nothing_changed_builds_nothing(ray_local: None, tmp_path: Path) -> None:
    store = write_output(tmp_path, parts=4)
    settings = IndexConfig(**QUICK)
    first = build_index(store, ENCODER, "image", settings)
    said: list[str] = []
    assert build_index(store, ENCODER, "image", settings, said.append) == first
    assert len(said) == 1 and "up to date" in said[0]
    forced = build_index(store, ENCODER, "image", settings, force=True)
    assert forced.version == "v0002" == current_version(store, f"index/{ENCODER}/image")
    assert forced.parts == first.parts and forced.recall == first.recall
    assert [shard.sha256 for shard in forced.shards] == [shard.sha256 for shard in first.shards]


def test_pinned_and_without_recall_the_same_build_gives_the_same(ray_local: None, tmp_path: Path) -> None:
    store = write_output(tmp_path, parts=4, rows=300)
    settings = IndexConfig(
        index_key="OPQ4_16,IVF16,PQ4x4", search_params="nprobe=3,ht=64", recall_queries=0, floor=0, shards=2
    )
    built = [build_index(store, ENCODER, "image", settings, force=True) for _ in range(2)]
    assert {release.search_params for release in built} == {"nprobe=3,ht=64"}
    assert built[0].query_ms > 0 and built[0].rerank and built[0].rerank.query_ms > 0
    assert not built[0].recall.queries and not built[0].curve and built[0].recall.lowest_at_10 is None
    assert [[file.sha256 for file in release.files] for release in built] == [[f.sha256 for f in built[0].files]] * 2
    assert "Not measured" in (tmp_path / built[0].folder / "report.md").read_text()
    (row,) = Searcher(store).search(everything(tmp_path, "image")[1][[7]], 3)
    assert row[0].id == 7


def test_captions_measure_an_image_index_too(ray_local: None, tmp_path: Path) -> None:
    store = write_output(tmp_path, parts=4)
    release = build_index(store, ENCODER, "image", IndexConfig(**QUICK, variants=["PCA8,Flat"], variant_vectors=500))
    assert release.index_key == "Flat"
    assert release.recall.queries == {"image": 75, "text": 100}
    assert all(figure == 1 for kind in release.recall.figures.values() for figure in kind.values())
    assert release.variants and [row.key for row in release.variants.rows] == ["PCA8,Flat", "Flat"]
    assert release.variants.queries == release.recall.queries and 400 < release.variants.vectors <= 500
    assert "| `PCA8,Flat` | l2 |" in (tmp_path / release.folder / "report.md").read_text()
    # They tell of an index, and make no other one of it.
    assert build_index(store, ENCODER, "image", IndexConfig(**QUICK)) == release


def test_old_ids_stay_when_parts_are_added_and_not_when_one_is_replaced(ray_local: None, tmp_path: Path) -> None:
    store = write_output(tmp_path, parts=3, first=3)
    settings = IndexConfig(index_key="IVF4,Flat", metric="l2", shards=2, **QUICK)
    first = build_index(store, ENCODER, "image", settings)
    write_output(tmp_path, parts=2, first=0)
    second = build_index(store, ENCODER, "image", settings)
    assert second.id_space == first.id_space and second.parts.ranges[:3] == first.parts.ranges
    for id in (0, 250, first.parts.rows - 1):
        (before,), (after,) = trace(store, first, [id]), trace(store, second, [id])
        assert (before.shard, before.row) == (after.shard, after.row)
        hits = Searcher(store, params="nprobe=4").search(before.vector[None], 1)
        assert hits[0][0].id == id and hits[0][0].score < 1e-5
    for modality in ("image", "text"):
        (tmp_path / "embeddings" / ENCODER / modality / part_name(4)).unlink()
    write_shard(tmp_path, 4, 100, 16, 0, "float16", ENCODER, 64, generation=1)
    said: list[str] = []
    third = build_index(store, ENCODER, "image", settings, said.append)
    assert third.id_space == 2 and any("ids start anew" in line for line in said)


def test_two_builds_at_once_take_two_versions(ray_local: None, tmp_path: Path) -> None:
    store = write_output(tmp_path, parts=4)
    with ThreadPoolExecutor(2) as pool:
        both = list(
            pool.map(lambda _: build_index(store, ENCODER, "image", IndexConfig(**QUICK), force=True), range(2))
        )
    assert sorted(release.version for release in both) == ["v0001", "v0002"]
    assert current_version(store, f"index/{ENCODER}/image") == "v0002"
    for version in ("v0001", "v0002"):
        assert len(Searcher(store, release=version).search(np.ones((1, 16), np.float32), 5)[0]) == 5


def test_a_build_that_fails_leaves_the_current_release_and_nothing_else(ray_local: None, tmp_path: Path) -> None:
    store = write_output(tmp_path, parts=4)
    first = build_index(store, ENCODER, "image", IndexConfig(**QUICK))
    # Its footer is whole: it fails in the tasks, after the version is claimed.
    damage(tmp_path / "embeddings" / ENCODER / "image" / part_name(2))
    with pytest.raises(IndexBuildError, match=rf"{part_name(2)} is damaged"):
        build_index(store, ENCODER, "image", IndexConfig(**QUICK), force=True)
    assert read_release(store, ENCODER, "image") == first
    files = [path.relative_to(tmp_path).parts for path in tmp_path.rglob("*") if path.is_file()]
    assert not [parts for parts in files if "v0002" in parts or parts[0] == "staging"]


def test_mistakes_are_told_before_anything_is_written(ray_local: None, tmp_path: Path) -> None:
    store = write_output(tmp_path, parts=4)
    with pytest.raises(ConfigError, match=f"(?s)no encoder 'nope'.*{ENCODER}"):
        build_index(store, "nope", "image", IndexConfig())
    with pytest.raises(ConfigError, match="needs a leading OPQ"):
        build_index(store, ENCODER, "image", IndexConfig(index_key="IVF4,PQ4x4"))
    with pytest.raises(IndexBuildError, match="learns 4,096 clusters"):
        build_index(store, ENCODER, "image", IndexConfig(index_key="IVF4096,Flat"))
    with pytest.raises(IndexBuildError, match="shard_memory"):
        build_index(store, ENCODER, "image", IndexConfig(shard_memory="1K"))
    assert not (tmp_path / "index").exists() and not (tmp_path / "staging").exists()


def test_below_the_floor_a_release_is_built_and_waits_to_be_accepted(ray_local: None, tmp_path: Path) -> None:
    store = write_output(tmp_path, parts=6, rows=400)
    home = f"index/{ENCODER}/image"
    build_index(store, ENCODER, "image", IndexConfig(**QUICK))
    poor = IndexConfig(index_key="OPQ4_16,IVF16,PQ4x4", rerank="none", **{**QUICK, "floor": 0.95})
    with pytest.raises(NotPublishedError, match=r"v0002 is built but not published: recall@10 of (image|text) queries"):
        build_index(store, ENCODER, "image", poor)
    assert current_version(store, home) == "v0001"
    said: list[str] = []
    with pytest.raises(NotPublishedError):
        build_index(store, ENCODER, "image", poor, said.append)
    assert any("up to date" in line for line in said), "it is not built again to be refused again"
    built = build_index(store, ENCODER, "image", poor.model_copy(update={"floor": 0.0}))
    assert built.version == "v0002" == current_version(store, home)
    assert rollback(store, ENCODER, "image").version == "v0001" == current_version(store, home)
    build_index(store, ENCODER, "image", poor.model_copy(update={"floor": 0.0}), said.append)
    assert current_version(store, home) == "v0001" and "was rolled back" in said[-1]
    publish(store, built, 0, 3)
    assert [listed.state for listed in list_releases(store, ENCODER, "image")] == ["previous", "current"]


@pytest.mark.parametrize(("rows", "key"), [(1, None), (2, None), (40, "IVF4,Flat")])
def test_the_smallest_outputs_have_an_index(ray_local: None, tmp_path: Path, rows: int, key: str | None) -> None:
    store = write_output(tmp_path, parts=1, rows=rows)
    settings = IndexConfig(index_key=key, rerank="int8", target_recall=0.9, **{**QUICK, "floor": 0.9})
    release = build_index(store, ENCODER, "image", settings)
    assert release.round_trips == release.parts.rows
    _, vectors = everything(tmp_path, "image")
    assert [row[0].id for row in Searcher(store, params=full_probe(release.index_key)).search(vectors, 1)] == list(
        range(len(vectors))
    )


def test_vectors_that_are_all_the_same_have_an_index_and_nothing_to_miss(ray_local: None, tmp_path: Path) -> None:
    store = write_output(tmp_path, parts=2, rows=700)
    for at in range(2):
        for modality in ("image", "text"):
            make_equal(tmp_path / "embeddings" / ENCODER / modality / part_name(at))
    # Of two lists that hold all, the clock of a busy machine would have a search look into one.
    coded = IndexConfig(index_key="OPQ4_16,IVF16,PQ4x4", search_params="nprobe=16,ht=64", **QUICK)
    for settings in (IndexConfig(**QUICK), coded):
        release = build_index(store, ENCODER, "image", settings)
        assert release.recall.lowest_at_10 == 1
        (row,) = Searcher(store).search(np.ones((1, 16), np.float32), 5)
        assert len(row) == 5


@pytest.mark.usefixtures("ray_local")
def test_no_more_answers_wait_in_the_object_store_than_a_few_for_each_cpu() -> None:
    begun, most = list[int](), 2 * int(ray.cluster_resources()["CPU"])

    def begin(number: int) -> Any:
        begun.append(number)
        return ray.put(number)

    for at, found in enumerate(results(partial(begin, number) for number in range(5 * most))):
        assert found == at and len(begun) <= at + 1 + most
    assert begun == list(range(5 * most))


ON_A_CLUSTER_WITH_A_GPU = """
import sys, tempfile
from pathlib import Path
from pipelines.config import IndexConfig
from pipelines.index.build import build_index
from pipelines.storage import Store
from tests.conftest import start

with tempfile.TemporaryDirectory(prefix="vm", ignore_cleanup_errors=True) as folder:
    start(folder, num_gpus=1)
    settings = IndexConfig.model_validate_json(sys.argv[2])
    made = build_index(Store(sys.argv[1]), sys.argv[3], "image", settings, print, force=True)
    print(made.version, made.round_trips, made.recall.lowest_at_10)
"""


@pytest.mark.long
def test_where_the_cluster_has_a_gpu_it_is_trained_there(ray_local: None, tmp_path: Path) -> None:
    """One that Ray is told of; FAISS finds none in the process there, and trains on its CPUs."""
    store, settings = write_output(tmp_path, parts=4, rows=700), IndexConfig(index_key="OPQ4_16,IVF16,PQ4x4", **QUICK)
    here: list[str] = []
    release = build_index(store, ENCODER, "image", settings, here.append)
    assert not any("GPU" in line for line in here)
    arguments = [str(tmp_path), settings.model_dump_json(), ENCODER]
    command = [sys.executable, "-c", ON_A_CLUSTER_WITH_A_GPU, *arguments]
    printed = subprocess.check_output(command, text=True, timeout=400)
    # Its node says so itself.
    assert re.search(r"^training on a GPU of node [\d.]+$", printed, re.MULTILINE)
    version, round_trips, recall = printed.splitlines()[-1].split()
    assert version == "v0002" and int(round_trips) == release.round_trips
    assert float(recall) == pytest.approx(release.recall.lowest_at_10, abs=0.05)
