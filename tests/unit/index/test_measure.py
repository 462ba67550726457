"""What is told of a release: recall as a user has it, ids that lead back, a report to read, and room that was there."""

from pathlib import Path

import faiss
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines.config import IndexConfig
from pipelines.errors import IndexBuildError, LedgerError
from pipelines.index.manifest import CurvePoint, IndexShard, Recall, Rerank
from pipelines.index.measure import Answers, Ask, Found, Samples, draw_samples, holds, merged, require_whole
from pipelines.index.plan import make_plan
from pipelines.index.queries import Queries
from pipelines.index.recall import Top, exact, recall_at, recall_of
from pipelines.index.report import FIGURES, markdown
from pipelines.index.rerank import Coding, scores_of
from pipelines.index.room import DiskFullError, require_disks, require_free_disk
from pipelines.index.train import train
from pipelines.index.tune import around
from tests.unit.index.test_parts import of_rows
from tests.unit.index.test_release import release
from tests.unit.index.test_rerank import Lossy

KEYS = [
    ("Flat", "ip"),
    ("HNSW8", "ip"),
    ("IVF8,Flat", "ip"),
    ("OPQ4_16,IVF8,PQ4x4", "ip"),
    ("OPQ4_16,IVF8_HNSW8,PQ4x4", "ip"),
    ("PCA8,IVF8,PQ4x4", "l2"),
    ("PCA8,Flat", "l2"),
    ("SQ8", "l2"),
]


def normal(rows: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(rows, 16)).astype(np.float32)


@pytest.mark.parametrize(("key", "metric"), KEYS)
def test_an_id_that_leads_to_another_vector_is_noticed(key: str, metric: str) -> None:
    vectors = normal(600)
    index = train(key, metric, vectors, 16)
    index.add_with_ids(vectors, np.arange(1000, 1600))
    shard = IndexShard(file="f", first_id=1000, rows=600, bytes=0, sha256="")
    ids = np.arange(1003, 1600, 40)
    assert holds(index, shard, Samples(ids, vectors[ids - 1000])).all()
    swapped = vectors[ids - 1000].copy()
    swapped[[2, 5]] = swapped[[5, 2]]
    assert np.flatnonzero(~holds(index, shard, Samples(ids, swapped))).tolist() == [2, 5]
    with pytest.raises(IndexBuildError, match="holds other vectors under 2 of 15 sampled ids"):
        require_whole(Named(), "i", shard, Answers([], holds(index, shard, Samples(ids, swapped))))  # type: ignore[arg-type]


class Named:
    def uri(self, path: str) -> str:
        return path


def test_sampled_ids_are_traced_to_their_vectors_and_keys(tmp_path: Path) -> None:
    made = Lossy(tmp_path)
    samples = draw_samples(made.store, made.parts, 0)
    assert len(samples.ids) == 64 and (np.diff(samples.ids) > 0).all()
    np.testing.assert_array_equal(samples.vectors, made.vectors[samples.ids])
    for path in (tmp_path / "samples").glob("*.parquet"):
        table = pq.read_table(path)
        at = table.schema.get_field_index("key")
        pq.write_table(table.set_column(at, "key", pa.array(["other"] * len(table))), path)
    with pytest.raises(LedgerError, match="has another key for row"):
        draw_samples(made.store, made.parts, 0)


def test_re_ranked_recall_is_of_as_many_candidates_as_a_search_gets(tmp_path: Path) -> None:
    made = Lossy(tmp_path)
    own = np.arange(0, made.parts.rows, 60)
    queries = Queries({"image": made.vectors[own]}, own)
    asks = [Ask("nprobe=16", 301)]
    answers = []
    for shard in made.shards:
        index = faiss.read_index(str(tmp_path / made.release.folder / shard.file))
        faiss.ParameterSpace().set_index_parameters(index, "nprobe=16")
        scores, ids = index.search(queries.vectors, 301)
        answers.append(Answers([Top(ids, scores)], np.ones(1, bool)))
    (top,) = merged(answers, asks, "ip", queries.own)
    assert not (top.ids == own[:, None]).any() and top.ids.shape == (len(own), 300)
    scores = scores_of(queries.vectors, top.ids, made.stored(), "ip")
    truth = exact(queries.vectors, [(0, made.vectors)], 101, "ip")
    truth = Top(truth.ids[:, 1:], truth.scores[:, 1:])
    found = Found(top, scores, "ip", 3, True)
    alone, reranked = found.figures(truth, queries)["image"], found.reranked(truth, queries)["image"]
    assert reranked["recall@10"] > alone["recall@10"] and reranked["recall@100"] > alone["recall@100"]
    within = np.mean([np.isin(truth.ids[at, :10], top.ids[at, :30]).mean() for at in range(len(own))])
    assert reranked["recall@10"] == pytest.approx(within), "all of the ten that are among thirty candidates"
    assert Found(top, None, "ip", 1, False).reranked(truth, queries) == {}
    nearest = np.mean([truth.ids[at, 0] in top.ids[at, :30] for at in range(len(own))])
    assert reranked["1-recall@10"] == pytest.approx(nearest) and reranked["1-recall@10"] > reranked["recall@10"]
    assert alone["1-recall@10"] > alone["recall@1"]


def test_of_equal_vectors_it_does_not_matter_which_is_found() -> None:
    truth = Top(np.arange(10)[None], np.full((1, 10), 0.5, np.float32))
    found = Top(np.arange(20, 30)[None], np.full((1, 10), 0.5, np.float32))
    assert recall_at(10, found, truth) == 0 and recall_at(10, found, truth, scored=True) == 1
    worse = Top(found.ids, np.full((1, 10), 0.4999, np.float32))
    assert recall_at(10, worse, truth, scored=True) == 0 and recall_at(10, worse, truth, "l2", scored=True) == 1


def test_of_nothing_to_find_all_is_found() -> None:
    none = Top(np.full((1, 3), -1), np.zeros((1, 3), np.float32))
    assert set(recall_of(none, none).values()) == {1.0}


@pytest.mark.parametrize(
    ("key", "params", "expected"),
    [
        ("Flat", "", [""]),
        ("IVF64,Flat", "nprobe=32", ["nprobe=1", "nprobe=2", "nprobe=8", "nprobe=32", "nprobe=64"]),
        ("IVF64,Flat", "nprobe=1", ["nprobe=1", "nprobe=4"]),
        ("HNSW32", "efSearch=16", ["efSearch=1", "efSearch=4", "efSearch=16", "efSearch=64"]),
        (
            "OPQ8_32,IVF64_HNSW32,PQ8x8",
            "nprobe=4,efSearch=9,ht=2048",
            ["nprobe=1,efSearch=2,ht=2048", "nprobe=4,efSearch=9,ht=2048", "nprobe=16,efSearch=32,ht=2048"],
        ),
    ],
)
def test_the_curve_goes_around_what_was_chosen(key: str, params: str, expected: list[str]) -> None:
    assert around(key, params) == expected


def test_the_report_has_every_figure() -> None:
    kinds = ("image", "text")
    made = release("v0001").model_copy(
        update={
            "parts": of_rows(1_000, 234),
            "index_key": "OPQ8_32,IVF64,PQ8x8",
            "search_params": "nprobe=4",
            "query_ms": 1.5,
            "recall": Recall(
                queries={"image": 9, "text": 7},
                figures={kind: dict(zip(FIGURES, (0.41, 0.42, 0.43, 0.7, 0.8), strict=True)) for kind in kinds},
                reranked={kind: dict(zip(FIGURES, (0.91, 0.92, 0.93, 0.98, 0.99), strict=True)) for kind in kinds},
            ),
            "rerank": Rerank(coding=Coding(dtype="float16"), factor=10, query_ms=0.25),
            "bytes_per_vector": {"index": 16.0, "rerank": 64.1},
            "curve": (
                CurvePoint(search_params="nprobe=1", query_ms=0.5, recall={"image": 0.2}, reranked={"image": 0.3}),
                CurvePoint(search_params="nprobe=4", query_ms=1.5, recall={"image": 0.42}, reranked={"image": 0.92}),
            ),
            "seconds": {"train": 12.3},
            "round_trips": 64,
        }
    )
    report = markdown(made)
    for line in (
        "| image (9) | index alone | 0.410 | 0.420 | 0.430 | 0.700 | 0.800 | 1.50 | 16.0 |",
        "| text (7) | re-ranked x10 | 0.910 | 0.920 | 0.930 | 0.980 | 0.990 | 1.75 | 80.1 |",
        "| `nprobe=4` (chosen) | 1.50 | 1.75 | 0.420 | 0.920 |",
        "| train | 12.3 | 0 |",
        "- 64 sampled ids led back to their part, row, key and vector",
    ):
        assert line in report, report


def test_a_disk_without_room_is_told_before_anything_starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = make_plan(of_rows(5_000, 5_000), IndexConfig(index_key="OPQ4_4,IVF4,PQ4x4", shards=2))
    assert plan.rerank == "float16" and plan.output_bytes > plan.scratch_bytes > 5_000 * (2 * 4 + 2)
    require_disks(plan, tmp_path / "not" / "there")
    free = plan.output_bytes + plan.scratch_bytes - 1
    monkeypatch.setattr("shutil.disk_usage", lambda folder: type("Usage", (), {"free": free}))
    with pytest.raises(IndexBuildError, match=rf"needs about {free + 1:,} bytes on the disk of .*; {free:,} are free"):
        require_disks(plan, tmp_path)
    require_disks(plan, None)
    require_disks(plan, tmp_path, nodes=4)
    require_free_disk(tmp_path, free)
    require_disks(plan, tmp_path, there=1)
    with pytest.raises(DiskFullError, match=f"needs about {plan.output_bytes + 2 * plan.scratch_bytes - 9:,} bytes"):
        require_disks(plan, tmp_path, there=9, cpus=16)
