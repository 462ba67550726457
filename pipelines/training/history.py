"""What the figures of the epochs so far say: which was the best, and whether more of them are worth it."""

from __future__ import annotations

from typing import Any

from pipelines.training.settings import StopConfig

History = list[dict[str, Any]]
"""Figures by epoch; those that were evaluated have recalls."""


def score(told: dict[str, Any], stop: StopConfig) -> float | None:
    return told[stop.metric][f"recall@{stop.k}"] if stop.metric in told else None


def best(history: History, stop: StopConfig) -> int:
    """Place of the best evaluation, the earliest of equal ones; the last epoch's where there is none."""
    scores = [(found, -at) for at, told in enumerate(history) if (found := score(told, stop)) is not None]
    return -max(scores)[1] if scores else len(history) - 1


def exhausted(history: History, stop: StopConfig) -> bool:
    """Whether the last `patience` evaluations brought nothing better."""
    since = sum(score(told, stop) is not None for told in history[best(history, stop) + 1 :]) if history else 0
    return bool(stop.patience and since >= stop.patience)
