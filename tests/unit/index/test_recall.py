import numpy as np
import pytest

from pipelines.index.recall import (
    EXACT_METRICS,
    RESULT_BYTES,
    TIED_BYTES,
    TIES,
    Top,
    exact,
    merge,
    recall_of,
    with_ties,
    without,
)


def vectors(n: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(n, 8)).astype(np.float32)


@pytest.mark.parametrize("metric", ["ip", "l2"])
@pytest.mark.parametrize("step", [1, 7, 64, 500])
def test_exact_in_batches_is_brute_force(metric: str, step: int) -> None:
    base, queries = vectors(200), vectors(9, 1)
    top = exact(queries, ((at, base[at : at + step]) for at in range(0, 200, step)), 11, metric)
    scores = queries @ base.T if metric == "ip" else ((queries[:, None] - base[None]) ** 2).sum(-1)
    order = np.argsort(-scores if metric == "ip" else scores, axis=1)[:, :11]
    np.testing.assert_array_equal(top.ids, order)
    np.testing.assert_allclose(top.scores, np.take_along_axis(scores, order, 1), rtol=1e-4, atol=1e-4)


def test_merge_drops_missing_and_orders_equal_scores_by_id() -> None:
    one = Top(np.array([[9, 4, -1]]), np.array([[2.0, 1.0, -3e38]], np.float32))
    two = Top(np.array([[7, 3]]), np.array([[2.0, 1.0]], np.float32))
    assert merge([one, two], 4, "ip").ids.tolist() == [[7, 9, 3, 4]]
    assert merge([one, two], 5, "ip").ids.tolist() == [[7, 9, 3, 4, -1]]
    assert merge([one, two], 2, "l2").ids.tolist() == [[3, 4]]


def test_only_queries_with_equal_scores_are_asked_again_a_set_size_at_a_time() -> None:
    """Every third query is nearest to 10,000 copies, which FAISS would give in whatever order."""
    queries = np.arange(600, dtype=np.float32)[:, None]
    asked: list[tuple[int, int]] = []

    def ask(some: np.ndarray, count: int) -> Top:
        asked.append((len(some), count))
        copies = some % 3 == 0
        ids = np.where(copies, max(0, 10_000 - count) + np.arange(count), 10 * some + np.arange(count))
        return Top(ids.astype(np.int64), np.where(copies, 1.0, 1 - np.arange(count) / 2**15).astype(np.float32))

    top = with_ties(ask, queries, 5)
    assert top.ids[::3].tolist() == [list(range(5))] * 200
    assert top.ids[1].tolist() == [10, 11, 12, 13, 14] and top.ids[2].tolist() == [20, 21, 22, 23, 24]
    assert asked[0] == (600, 5 + TIES[0]) and len(asked) > 3
    for more in TIES[1:]:
        assert sum(some for some, count in asked if count == 5 + more) == 200
    assert all(some * count * RESULT_BYTES <= TIED_BYTES for some, count in asked)


def test_late_ones_stay_late_when_some_are_asked_again() -> None:
    one = Top(np.array([[1, 2], [3, 4]]), np.zeros((2, 2), np.float32))
    late = Top(np.array([[9, 8]]), np.ones((1, 2), np.float32), np.array([[False, True]]))
    both = one.replaced(np.array([1]), late)
    assert both.ids.tolist() == [[1, 2], [9, 8]] and both.late is not None
    assert both.late.tolist() == [[False, False], [False, True]]
    assert both.replaced(np.array([1]), Top(late.ids, late.scores)).late.tolist() == [[False, False]] * 2  # type: ignore[union-attr]


def test_without_takes_out_the_own_id_or_else_the_last() -> None:
    top = Top(np.array([[5, 6, 7], [6, 5, 7], [1, 2, 3]]), np.arange(9, dtype=np.float32).reshape(3, 3))
    left = without(top, np.array([5, 5, -1]))
    assert left.ids.tolist() == [[6, 7], [6, 7], [1, 2]]
    assert left.scores.tolist() == [[1, 2], [3, 5], [6, 7]]


def test_recall_is_the_share_of_the_true_nearest() -> None:
    truth = Top(np.arange(200).reshape(2, 100), np.zeros((2, 100), np.float32))
    found = truth.ids.copy()
    found[0, 0], found[1, 50:] = 1, -1
    figures = recall_of(Top(found, truth.scores), truth)
    assert figures == {"recall@1": 0.5, "recall@10": 0.95, "recall@100": (99 + 50) / 200}


def test_recall_where_there_are_fewer_than_k() -> None:
    truth = Top(np.array([[3, 1, -1]]), np.zeros((1, 3), np.float32))
    assert recall_of(truth, truth) == {"recall@1": 1.0, "recall@10": 1.0, "recall@100": 1.0}


@pytest.mark.parametrize("metric", EXACT_METRICS)
def test_every_metric_is_as_numpy_has_it(metric: str) -> None:
    base, queries = vectors(300) * 3, vectors(7, 1)
    base[11] = 0
    top = exact(queries, ((at, base[at : at + 40]) for at in range(0, 300, 40)), 12, metric)
    apart = queries[:, None] - base[None]
    lengths = np.linalg.norm(queries, axis=1)[:, None] * np.linalg.norm(base, axis=1)[None]
    scores = {
        "ip": queries @ base.T,
        "l2": (apart**2).sum(-1),
        "cosine": queries @ base.T / np.where(lengths > 0, lengths, 1),
        "l1": np.abs(apart).sum(-1),
    }[metric]
    order = np.argsort(-scores if metric in ("ip", "cosine") else scores, axis=1, kind="stable")[:, :12]
    np.testing.assert_array_equal(top.ids, order)
    np.testing.assert_allclose(top.scores, np.take_along_axis(scores, order, 1), rtol=1e-4, atol=1e-4)
