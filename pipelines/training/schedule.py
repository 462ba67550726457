"""The learning rate of a step, and how averaged weights follow those that are trained."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import cos, pi

import torch
from torch import Tensor

from pipelines.training.settings import OptimConfig


def learning_rate(epoch: int, step: int, steps_per_epoch: int, optim: OptimConfig) -> float:
    """Of a step of an epoch, both from 0 on. What follows the frozen stage has a schedule of its own, over the epochs
    that are left. steps_per_epoch: as expected; an epoch of more or fewer moves no other one's rates."""
    at = epoch * steps_per_epoch + min(step, steps_per_epoch - 1)
    frozen = optim.frozen_epochs * steps_per_epoch
    if at < frozen:
        return optim.lr * _factor(at, frozen, steps_per_epoch, optim)
    left = (optim.epochs - optim.frozen_epochs) * steps_per_epoch
    base = (optim.finetune_lr or optim.lr) if optim.frozen_epochs else optim.lr
    return base * _factor(at - frozen, left, steps_per_epoch, optim)


def _factor(step: int, steps: int, steps_per_epoch: int, optim: OptimConfig) -> float:
    warmup = round(optim.warmup_epochs * steps_per_epoch)
    if step < warmup:
        return (step + 1) / warmup
    if optim.schedule == "cosine":
        return (1 + cos(pi * min(1.0, (step - warmup) / max(1, steps - warmup)))) / 2
    if optim.schedule == "step":
        return float(optim.step_factor ** ((step - warmup) // max(1, round(optim.step_epochs * steps_per_epoch))))
    return 1.0


def averaging(decay: float) -> Callable[[Sequence[Tensor], Sequence[Tensor], Tensor | int], None]:
    """For `torch.optim.swa_utils.AveragedModel`: min(decay, (1 + n) / (10 + n)) after n updates, as TensorFlow's
    ExponentialMovingAverage, so that a short run's average is of trained weights and not of the first ones."""

    @torch.no_grad()
    def average(averaged: Sequence[Tensor], current: Sequence[Tensor], updates: Tensor | int) -> None:
        n = float(updates)
        weight = 1 - min(decay, (1 + n) / (10 + n))
        for kept, new in zip(averaged, current, strict=True):
            if kept.is_floating_point():
                kept.lerp_(new.to(kept.dtype), weight)
            else:
                kept.copy_(new)

    return average
