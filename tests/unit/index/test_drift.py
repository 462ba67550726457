"""The quantiser's error on new vectors against that on old ones."""

import faiss
import numpy as np
import pytest

from pipelines.index.choose import empty_index
from pipelines.index.drift import Drift, drift, warning

DIM = 16
KEYS = [("OPQ4_16,IVF16,PQ4x4", "code"), ("IVF16,Flat", "centroid"), ("IVF16_HNSW8,PQ4x4", "code"), ("SQ4", "code")]


def around(centres: np.ndarray, seed: int, count: int = 400) -> np.ndarray:
    random = np.random.default_rng(seed)
    return (centres[random.integers(len(centres), size=count)] + random.normal(0, 0.3, (count, DIM))).astype(np.float32)


def centres(seed: int) -> np.ndarray:
    return np.random.default_rng([9, seed]).normal(size=(12, DIM))


@pytest.mark.parametrize(("key", "of"), KEYS)
def test_vectors_like_the_old_do_not_drift_and_others_do(key: str, of: str) -> None:
    index = empty_index(key, DIM, "l2")
    index.train(around(centres(0), 0, 4_000))
    old = around(centres(0), 1)
    like, unlike = drift(index, old, around(centres(0), 2)), drift(index, old, around(3 * centres(1), 3))
    assert like and unlike and like.of == of and like.old == unlike.old > 0
    assert 0.9 < like.ratio < 1.1 and unlike.ratio > 2
    assert warning(like, 1.5) is None and f"{unlike.ratio:.2f} times" in (warning(unlike, 1.5) or "")


def test_the_error_is_that_of_the_decoded_vector() -> None:
    index = faiss.index_factory(DIM, "PQ4x4")
    sample = around(centres(0), 0, 1_000)
    index.train(sample)
    old, new = around(centres(0), 1), around(centres(1), 2)
    found = drift(index, old, new)
    index.add(np.concatenate([old, new]))
    apart = ((index.reconstruct_n(0, 800) - np.concatenate([old, new])) ** 2).sum(axis=1)
    spread = ((old - old.mean(axis=0)) ** 2).sum(axis=1).mean()
    assert found and found.old == pytest.approx(apart[:400].mean() / spread, rel=1e-4)
    assert found.new == pytest.approx(apart[400:].mean() / spread, rel=1e-4)


@pytest.mark.parametrize("key", ["Flat", "HNSW8"])
def test_what_keeps_vectors_whole_does_not_drift(key: str) -> None:
    old = around(centres(0), 1)
    assert drift(empty_index(key, DIM, "ip"), old, 5 * old) is None
    assert warning(None, 1.5) is None


def test_a_graph_behind_a_transform_drifts_by_its_codes() -> None:
    index = empty_index("PCA8,HNSW8,SQ4", DIM, "l2")
    index.train(around(centres(0), 0, 4_000))
    found = drift(index, around(centres(0), 1), around(3 * centres(1), 2))
    assert found and found.of == "code" and found.ratio > 2


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_of_what_cannot_be_measured_no_figure_is_made_up() -> None:
    sample = around(centres(0), 0, 1_000)
    graph, code = faiss.index_factory(DIM, "NSG8,SQ8"), faiss.index_factory(DIM, "SQ4")
    code.train(sample)
    assert drift(graph, sample[:100], sample[100:200]) is None, "FAISS encodes nothing with it"
    assert drift(code, sample[:100], np.full((10, DIM), 1e30, np.float32)) is None, "no finite number"


def test_old_vectors_without_an_error_divide_nothing_by_zero() -> None:
    assert Drift(of="code", old=0, new=0).ratio == 0 and Drift(of="code", old=0, new=0.1).ratio > 1e6
