import faiss
import numpy as np
import pytest

from pipelines.config import IndexConfig
from pipelines.errors import ConfigError
from pipelines.index.plan import make_plan
from pipelines.index.train import train
from pipelines.index.tune import BATCH_QUERIES, CHEAP_REACH, apply, batch_query_ms, full_probe, least, query_ms, tune
from tests.unit.index.test_parts import of_rows

KEYS = {
    "OPQ4_16,IVF16,PQ4x4": "ip",
    "OPQ4_16,IVF16_HNSW8,PQ4x4": "ip",
    "Pad32,IVF16_HNSW8,PQ4x4": "ip",
    "IVF16,Flat": "ip",
    "PCA8,IVF16,PQ4x4": "l2",
    "HNSW8": "ip",
    "Flat": "ip",
    "SQ8": "l2",
}


@pytest.mark.parametrize("key", KEYS)
def test_what_is_tuned_can_be_applied_and_searched(key: str) -> None:
    vectors = np.random.default_rng(0).normal(size=(1000, 16)).astype(np.float32)
    index = train(key, KEYS[key], vectors, 16)
    index.add_with_ids(vectors, np.arange(1000))
    params = tune(index, key, 0.5)
    assert ("nprobe" in params, "efSearch" in params) == ("IVF" in key, "HNSW" in key)
    for each in (params, full_probe(key)):
        apply(index, each)
        assert (index.search(vectors[:3], 20)[1] >= 0).all()
    assert query_ms(index, vectors[:3]) > 0 and batch_query_ms(index, vectors[:3]) > 0


@pytest.mark.parametrize("key", ["IVF16,Flat", "PCA8,IVF16,PQ4x4"])
def test_one_query_has_one_thread_and_a_batch_all(key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    vectors = np.random.default_rng(0).normal(size=(1000, 16)).astype(np.float32)
    index = train(key, KEYS[key], vectors, 16)
    index.add_with_ids(vectors, np.arange(1000))
    threads, search = [], type(index).search

    def noted(self: object, queries: np.ndarray, *rest: int) -> tuple[np.ndarray, np.ndarray]:
        threads.append((len(queries), faiss.omp_get_max_threads()))
        found: tuple[np.ndarray, np.ndarray] = search(self, queries, *rest)
        return found

    before = faiss.omp_get_max_threads()
    monkeypatch.setattr(type(index), "search", noted)
    faiss.omp_set_num_threads(3)
    try:
        tune(index, key, 0.5)
        query_ms(index, vectors[:3])
        assert {on for _, on in threads} == {1}
        threads.clear()
        batch_query_ms(index, vectors[:3])
        assert set(threads) == {(BATCH_QUERIES, 3)}
    finally:
        faiss.omp_set_num_threads(before)


def test_parameters_an_index_has_not_are_refused() -> None:
    index = train("Flat", "ip", np.empty((0, 4), np.float32), 4)
    with pytest.raises(RuntimeError):
        apply(index, "nprobe=3")


def test_full_probe_looks_at_every_list() -> None:
    assert full_probe("OPQ8_32,IVF1024,PQ8x8") == "nprobe=1024"
    assert full_probe("OPQ8_32,IVF1024_HNSW32,PQ8x8") == "nprobe=1024,efSearch=2048"
    assert full_probe("HNSW32") == full_probe("Flat") == ""


@pytest.mark.parametrize("params", ["nprob=2", "efSearch=4", "x"])
def test_pinned_parameters_that_do_not_suit_are_told_before_anything_is_built(params: str) -> None:
    settings = IndexConfig(index_key="IVF4,Flat", search_params=params)
    with pytest.raises(ConfigError, match=f"index.search_params: '{params}' does not suit IVF4,Flat: could not"):
        make_plan(of_rows(500), settings)
    make_plan(of_rows(500), settings.model_copy(update={"search_params": "nprobe=2"}))


@pytest.mark.parametrize("wanted", [1, 2, 3, 7, 8, 13, 16, 33, 100, 511, 512])
def test_the_least_parameters_that_are_enough_are_found_without_looking_far(wanted: int) -> None:
    tried: list[int] = []

    def enough(several: list[str]) -> list[bool]:
        tried.extend(int(params.partition("=")[2]) for params in several)
        return [looked >= wanted for looked in tried[-len(several) :]]

    found = int(least("OPQ4_16,IVF512,PQ4x4", enough).removeprefix("nprobe="))
    assert wanted <= found <= wanted + wanted // 8 + 1
    assert max(tried) < max(CHEAP_REACH + 1, 2 * wanted), "what looks far costs most"


def test_the_furthest_parameters_where_none_is_enough() -> None:
    def enough(several: list[str]) -> list[bool]:
        return [False] * len(several)

    assert least("IVF16_HNSW8,PQ4x4", enough) == "nprobe=16,efSearch=32"
    assert least("HNSW8", enough) == "efSearch=16383"
    assert least("IVF1,Flat", enough) == "nprobe=1"
    assert least("Flat", enough) == ""
