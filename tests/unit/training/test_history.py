"""The best epoch, and when more are not worth it."""

from __future__ import annotations

from pipelines.training.history import best, exhausted
from pipelines.training.settings import StopConfig

STOP = StopConfig(patience=2)


def history(*scores: float | None) -> list[dict[str, object]]:
    return [{} if score is None else {"text_to_image": {"recall@1": score}} for score in scores]


def test_the_best_is_the_earliest_of_the_highest() -> None:
    assert best(history(0.1, 0.3, 0.2, 0.3), STOP) == 1
    assert best(history(None, 0.1, None), STOP) == 1
    assert best(history(None, None), STOP) == 1


def test_patience_counts_evaluations_since_the_best() -> None:
    assert not exhausted([], STOP) and not exhausted(history(0.1, 0.1), STOP)
    assert exhausted(history(0.1, 0.1, 0.1), STOP) and exhausted(history(0.3, 0.1, 0.2), STOP)
    assert not exhausted(history(0.3, None, 0.1, None), STOP) and exhausted(history(0.3, None, 0.1, None, 0.2), STOP)
    assert not exhausted(history(0.1, 0.05, 0.2), STOP)
    assert not exhausted(history(0.3, 0.1, 0.1, 0.1), StopConfig()) and not exhausted(history(None, None, None), STOP)


def test_the_metric_is_the_one_that_is_asked_for() -> None:
    told = [
        {"text_to_image": {"recall@1": 0.1}, "image_to_text": {"recall@10": 0.9}},
        {"text_to_image": {"recall@1": 0.2}, "image_to_text": {"recall@10": 0.8}},
    ]
    assert best(told, StopConfig()) == 1 and best(told, StopConfig(metric="image_to_text", k=10)) == 0
