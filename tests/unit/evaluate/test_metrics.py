from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torchmetrics.functional import retrieval as library

from pipelines.evaluate.metrics import (
    MISSING,
    Ranks,
    at_depths,
    average_precision,
    mean_average_precision,
    ndcg_at_k,
    of_whole,
    precision_at_k,
    ranked,
    ranks_in_order,
    ranks_of_counts,
    recall_at_k,
)

DEPTHS = (1, 3, 5, 10)


@st.composite
def rankings(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray]:
    """Scores and relevance, [q, n]; few distinct scores, so that most are tied."""
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    queries, items = draw(st.integers(1, 5)), draw(st.integers(1, 30))
    scores = random.integers(0, draw(st.sampled_from([1, 3, 10, 10**6])) + 1, (queries, items)).astype(np.float32)
    relevant = random.random((queries, items)) < draw(st.sampled_from([0.1, 0.5, 1.0]))
    relevant[np.arange(queries), random.integers(0, items, queries)] = True
    return scores, relevant


def written_out(scores: np.ndarray, relevant: np.ndarray, k: int) -> dict[str, float]:
    """The definitions, one query at a time, in plain Python."""
    totals: dict[str, list[float]] = {name: [] for name in ("recall", "precision", "ndcg", "map", "map@", "first")}
    for row, wanted in zip(scores.tolist(), relevant.tolist(), strict=True):
        order = sorted(range(len(row)), key=lambda at: (-row[at], wanted[at]))
        hits = [place for place, at in enumerate(order, 1) if wanted[at]]
        top = [place for place in hits if place <= k]
        precisions = [number / place for number, place in enumerate(hits, 1)]
        totals["recall"].append(float(bool(top)))
        totals["precision"].append(len(top) / k)
        ideal = sum(1 / math.log2(place + 1) for place in range(1, min(k, len(hits)) + 1))
        totals["ndcg"].append(sum(1 / math.log2(place + 1) for place in top) / ideal)
        totals["map"].append(sum(precisions) / len(hits))
        totals["map@"].append(sum(precisions[: len(top)]) / min(k, len(hits)))
        totals["first"].append(hits[0])
    means = {name: sum(values) / len(values) for name, values in totals.items()}
    return {**means, "median": float(np.median(totals["first"]))}


@given(rankings(), st.sampled_from(DEPTHS))
def test_every_figure_is_its_written_out_definition(case: tuple[np.ndarray, np.ndarray], k: int) -> None:
    ours, theirs = of_whole([ranked(*case)], (k,)), written_out(*case, k)
    expected = {
        f"recall@{k}": theirs["recall"],
        f"precision@{k}": theirs["precision"],
        f"ndcg@{k}": theirs["ndcg"],
        f"map@{k}": theirs["map@"],
        "map": theirs["map"],
        "median_rank": theirs["median"],
        "mean_rank": theirs["first"],
    }
    assert ours == pytest.approx(expected)


@given(rankings(), st.sampled_from(DEPTHS))
def test_every_figure_is_torchmetrics(case: tuple[np.ndarray, np.ndarray], k: int) -> None:
    """Which takes equal scores in any order, and those that are not above 0 for not found: it is given places."""
    scores, relevant = case
    place = np.argsort(np.lexsort((relevant, -scores), axis=1), axis=1)
    pairs = [
        (torch.tensor(1.0 + scores.shape[1] - each), torch.tensor(wanted))
        for each, wanted in zip(place, relevant, strict=True)
    ]
    ours = ranked(scores, relevant)

    def mean(metric: object, **how: int) -> float:
        return float(np.mean([metric(preds, target, **how) for preds, target in pairs]))  # type: ignore[operator]

    assert recall_at_k(ours, k) == pytest.approx(mean(library.retrieval_hit_rate, top_k=k))
    assert precision_at_k(ours, k) == pytest.approx(mean(library.retrieval_precision, top_k=k))
    assert ndcg_at_k(ours, k) == pytest.approx(mean(library.retrieval_normalized_dcg, top_k=k), abs=1e-6)
    assert mean_average_precision(ours) == pytest.approx(mean(library.retrieval_average_precision), abs=1e-6)
    assert float((1 / ours.first).mean()) == pytest.approx(mean(library.retrieval_reciprocal_rank), abs=1e-6)


def test_untied_scores_are_the_library_s_as_they_are() -> None:
    random = np.random.default_rng(3)
    scores, relevant = random.normal(size=(20, 200)).astype(np.float32), random.random((20, 200)) < 0.05
    relevant[:, 0] = True
    pairs = list(zip(torch.tensor(np.exp(scores)), torch.tensor(relevant), strict=True))
    expected = np.mean([library.retrieval_average_precision(*pair) for pair in pairs])
    assert mean_average_precision(ranked(scores, relevant)) == pytest.approx(expected)
    expected = np.mean([library.retrieval_normalized_dcg(*pair, top_k=10) for pair in pairs])
    assert ndcg_at_k(ranked(scores, relevant), 10) == pytest.approx(expected)


def test_one_vector_for_everything_finds_nothing() -> None:
    relevant = np.eye(50, dtype=bool)
    figures = of_whole([ranked(np.ones((50, 50), np.float32), relevant)])
    assert (figures["recall@10"], figures["median_rank"], figures["map"]) == (0, 50, pytest.approx(1 / 50))


@given(rankings())
def test_counts_of_what_comes_before_give_the_same_ranks(case: tuple[np.ndarray, np.ndarray]) -> None:
    scores, relevant = case
    whole = ranked(scores, relevant)
    ahead = np.full_like(whole.found, MISSING)
    for at, (row, wanted) in enumerate(zip(scores, relevant, strict=True)):
        of_relevant = sorted(int((row[~wanted] >= score).sum()) for score in row[wanted])
        ahead[at, : len(of_relevant)] = of_relevant
    counted = ranks_of_counts(ahead, whole.relevant)
    assert np.array_equal(counted.found, whole.found)


@given(rankings(), st.sampled_from(DEPTHS))
def test_the_first_k_decide_the_figures_at_depths(case: tuple[np.ndarray, np.ndarray], k: int) -> None:
    scores, relevant = case
    order = np.lexsort((relevant, -scores), axis=1)
    top = np.take_along_axis(relevant, order, axis=1)[:, :k]
    assert at_depths(ranks_in_order(top, relevant.sum(axis=1)), (k,)) == pytest.approx(at_depths(ranked(*case), (k,)))


def test_nothing_found_is_zero() -> None:
    none = ranks_in_order(np.zeros((4, 10), bool), np.full(4, 3))
    assert set(at_depths(none).values()) == {0.0} and none.first.tolist() == 4 * [MISSING]


@given(rankings())
def test_blocks_of_queries_give_the_figures_of_all(case: tuple[np.ndarray, np.ndarray]) -> None:
    scores, relevant = case
    blocks = [ranked(scores[at : at + 2], relevant[at : at + 2]) for at in range(0, len(scores), 2)]
    assert of_whole(blocks) == pytest.approx(of_whole([ranked(scores, relevant)]))


def test_average_precision_by_hand() -> None:
    assert average_precision(Ranks(np.array([[1, 4]]), np.array([2]))).tolist() == [0.75]
