from pathlib import Path

import faiss
import numpy as np
import pytest
from pydantic import ValidationError

from pipelines.config import IndexConfig
from pipelines.errors import IndexBuildError
from pipelines.index.parts import PartRange, Parts, list_parts
from pipelines.index.queries import queries_across, split_sample
from pipelines.index.train import draw, read_picked, train
from tests.indexed import ENCODER, everything, write_output
from tests.unit.index.test_parts import FOLDER, of_rows

KEY = "OPQ4_4,IVF16,PQ4x4"


def test_queries_stay_out_of_training() -> None:
    parts = of_rows(*[500] * 20)
    drawn = draw(parts, KEY, IndexConfig(recall_queries=300))
    assert len(drawn.train) == 1600 and len(drawn.queries) == 300
    assert sorted([*drawn.train, *drawn.queries]) == list(range(1900))
    ids = drawn.ids(parts)
    assert len(set(ids)) == 1900 and {id // 500 for id in ids[drawn.train]} == set(range(20))


def test_the_same_seed_draws_the_same() -> None:
    parts = of_rows(*[500] * 20)
    one, two, other = (draw(parts, KEY, IndexConfig(seed=seed)) for seed in (1, 1, 2))
    np.testing.assert_array_equal(one.ids(parts)[one.train], two.ids(parts)[two.train])
    assert not np.array_equal(one.ids(parts)[one.train], other.ids(parts)[other.train])


def test_an_index_that_learns_nothing_draws_queries_only() -> None:
    drawn = draw(of_rows(40), "Flat", IndexConfig())
    assert len(drawn.train) == 0 and len(drawn.queries) == 4


def test_without_recall_queries_are_still_held_out_for_latencies() -> None:
    drawn = draw(of_rows(500), KEY, IndexConfig(recall_queries=0, floor=0))
    assert len(drawn.queries) == 50
    with pytest.raises(ValidationError, match="set floor to 0 too"):
        IndexConfig(recall_queries=0)


def test_too_few_vectors_for_the_key() -> None:
    with pytest.raises(IndexBuildError, match="learns 256 clusters, from 180 vectors"):
        draw(of_rows(200), "OPQ4_4,IVF16,PQ4x8", IndexConfig())


def test_a_sample_beyond_memory_is_refused_before_it_is_read() -> None:
    many = Parts(folder="f", dim=4096, ranges=(PartRange(name="p", offset=0, rows=10**11),))
    with pytest.raises(IndexBuildError, match=r"Set index.train_vectors to [\d,]+ or less"):
        draw(many, "OPQ8_4096,IVF1024,PQ8x8", IndexConfig(train_vectors=10**10))


def test_what_is_read_is_what_was_drawn(tmp_path: Path) -> None:
    store = write_output(tmp_path, parts=5)
    parts = list_parts(store, FOLDER)
    drawn = draw(parts, "OPQ4_16,IVF8,PQ4x4", IndexConfig(train_vectors=400, recall_queries=50))
    _, vectors = everything(tmp_path, "image")
    chunks = [read_picked(store, parts.run(a, b), drawn.positions[a:b]) for a, b in ((0, 2), (2, 3), (3, 5))]
    sample, queries = split_sample(chunks, drawn, parts.dim)
    ids = drawn.ids(parts)
    np.testing.assert_array_equal(sample, vectors[ids[drawn.train]])
    np.testing.assert_array_equal(queries, vectors[ids[drawn.queries]])


def test_training_learns_once_and_adds_nothing() -> None:
    sample = np.random.default_rng(0).normal(size=(800, 16)).astype(np.float32)
    index = train("OPQ4_16,IVF8,PQ4x4", "ip", sample, 16)
    assert index.is_trained and index.ntotal == 0


def test_captions_are_asked_only_of_indexed_shards(tmp_path: Path) -> None:
    store = write_output(tmp_path, parts=4)
    images = list_parts(store, FOLDER)
    found = queries_across(store, ENCODER, "image", images.run(1, 2), IndexConfig(recall_queries=10**6))
    items, vectors = everything(tmp_path, "text")
    indexed = [at for at, item in enumerate(items) if item.shard.startswith("photos-00001")]
    np.testing.assert_array_equal(found["text"], vectors[indexed])
    assert queries_across(store, "absent", "image", images, IndexConfig()) == {}


def test_gpus_find_the_clusters_where_there_are_any(monkeypatch: pytest.MonkeyPatch) -> None:
    """Here a CPU index stands in for theirs: it is the one that is asked, and the trained index does not keep it."""
    sample = np.random.default_rng(0).normal(size=(800, 16)).astype(np.float32)
    asked: list[faiss.Index] = []

    def on_gpus(index: faiss.Index) -> faiss.Index:
        asked.append(index)
        return index

    monkeypatch.setattr(faiss, "get_num_gpus", lambda: 1)
    monkeypatch.setattr(faiss, "index_cpu_to_all_gpus", on_gpus, raising=False)
    for key, metric in (("OPQ4_16,IVF8,PQ4x4", "ip"), ("IVF8_HNSW8,Flat", "l2")):
        index = train(key, metric, sample, 16)
        assert asked and asked.pop().ntotal == 8, "the centroids went through it"
        assert index.is_trained and faiss.extract_index_ivf(index).clustering_index is None
    train("Flat", "ip", sample, 16)
    assert not asked
