"""Learning rates over a run, and averaged weights."""

from __future__ import annotations

import pytest
import torch
from torch.optim.swa_utils import AveragedModel

from pipelines.training.schedule import averaging, learning_rate
from pipelines.training.settings import OptimConfig


def rates(steps: int = 10, **settings: object) -> list[float]:
    optim = OptimConfig.model_validate({"lr": 1.0, **settings})
    return [learning_rate(epoch, step, steps, optim) for epoch in range(optim.epochs) for step in range(steps)]


def test_constant_is_constant_and_warm_up_rises_to_it() -> None:
    assert rates(epochs=2) == [1.0] * 20
    assert rates(epochs=2, warmup_epochs=0.5)[:6] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0, 1.0])


def test_cosine_falls_to_nothing() -> None:
    found = rates(epochs=4, schedule="cosine", warmup_epochs=1)
    assert max(found) == found[9] == found[10] == 1 and found == sorted(found[:10]) + sorted(found[10:], reverse=True)
    assert found[25] == pytest.approx(0.5) and found[-1] < 0.01


def test_steps_multiply() -> None:
    found = rates(epochs=5, schedule="step", step_epochs=2, step_factor=0.1)
    assert found == pytest.approx([1.0] * 20 + [0.1] * 20 + [0.01] * 10)


def test_steps_are_of_one_optimiser_step_at_least() -> None:
    assert rates(1, epochs=3, schedule="step", step_epochs=0.5, step_factor=0.5) == [1.0, 0.5, 0.25]


def test_what_follows_the_frozen_stage_has_a_rate_of_its_own() -> None:
    found = rates(epochs=5, frozen_epochs=2, finetune_lr=0.1, schedule="cosine")
    assert found[0] == 1 and found[19] < 0.01 and found[20] == pytest.approx(0.1) and found[-1] < 0.001


def test_epochs_of_fewer_steps_than_expected_do_not_move_the_stages() -> None:
    optim = OptimConfig(lr=1.0, epochs=4, frozen_epochs=2, finetune_lr=0.1)
    assert [learning_rate(epoch, step, 10, optim) for epoch in range(4) for step in range(7)] == [1.0] * 14 + [0.1] * 14
    assert learning_rate(1, 12, 10, optim) == 1.0


def test_averages_follow_quickly_at_first_and_slowly_later() -> None:
    weight = torch.nn.Linear(1, 1, bias=False)
    averaged, expected = AveragedModel(weight, multi_avg_fn=averaging(0.9), use_buffers=True), None
    for step in range(100):
        with torch.no_grad():
            weight.weight.fill_(float(step))
        averaged.update_parameters(weight)
        decay = min(0.9, (1 + step) / (10 + step))
        expected = float(step) if expected is None else decay * expected + (1 - decay) * step
    assert averaged.module.weight.item() == pytest.approx(expected, rel=1e-5)


def test_buffers_are_averaged_and_counters_copied() -> None:
    norm = torch.nn.BatchNorm1d(2)
    averaged = AveragedModel(norm, multi_avg_fn=averaging(0.5), use_buffers=True)
    for value in (1.0, 3.0):
        norm.running_mean.fill_(value)
        norm.num_batches_tracked.fill_(int(value))
        averaged.update_parameters(norm)
    assert 1 < averaged.module.running_mean[0].item() < 3 and averaged.module.num_batches_tracked.item() == 3
