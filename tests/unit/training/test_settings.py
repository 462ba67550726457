"""Recipes that come with the project, presets, and settings that contradict each other."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import jobs
from pipelines.config import load_settings, validate
from pipelines.encoders.matcher_model import Matcher
from pipelines.errors import ConfigError, PreflightError
from pipelines.prepare import Cluster
from pipelines.training.loop import matcher_config
from pipelines.training.settings import TrainConfig
from pipelines.training.train import resolved

RECIPES = sorted((Path(jobs.__file__).parent / "recipes" / "training").glob("*.yaml"))
LAPTOP = Cluster(cpus=4, gpus=0, nodes=1, node_cpus=4)
LEAST = {"input": "shards", "output": "out"}


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipes_are_valid_and_fit_a_laptop(path: Path) -> None:
    config = resolved(load_settings(TrainConfig, path), LAPTOP)
    assert config.workers.workers == 1 and config.optim.precision == "fp32"


@pytest.mark.parametrize(("preset", "features"), [("mobilenetv1", 1024), ("resnet50", 2048), ("resnet152", 2048)])
def test_presets_are_the_papers_backbones(preset: str, features: int) -> None:
    config = validate(TrainConfig, {**LEAST, "model": {"image_tower": preset}})
    with torch.device("meta"):
        matcher = Matcher(matcher_config(config.model, 0), 100)
    assert (matcher.image_head.in_features, matcher.image_head.out_features) == (features, 512)
    assert matcher.text_head.in_features == 1024


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"stop": {"patience": 2}}, "stop.patience needs samples to evaluate on"),
        ({"data": {"val": "val", "split": {}}}, "give one"),
        ({"loss": {"cmpm": 0, "cmpc": 0}}, "one of cmpm, cmpc and infonce"),
        ({"checkpoint": {"every_steps": 0}}, "checkpoint.every_steps"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        validate(TrainConfig, {**LEAST, **settings})


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"workers": {"workers": 4}}, "4 workers of 1 CPUs"),
        ({"workers": {"workers": 3}, "optim": {"batch_size": 16}}, "cannot be shared out among 3 workers"),
    ],
)
def test_what_would_wait_for_ever_is_refused(settings: dict[str, Any], told: str) -> None:
    with pytest.raises(PreflightError, match=told):
        resolved(validate(TrainConfig, {**LEAST, **settings}), LAPTOP)
