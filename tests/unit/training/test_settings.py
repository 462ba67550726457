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
FARM = Cluster(cpus=32, gpus=12, nodes=4, node_cpus=8, node_gpus=3, node_memory_mib=2_000)
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
        ({"data": {"identity": "id", "split": {}}}, "data.split.by = key would put some id both in"),
        ({"decode": {"alpha": "white"}}, "decode.alpha"),
        ({"data": {"val": "val"}}, "data.val without data.train"),
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
        ({"decode": {"max_pixels": 200_000_000}}, "max_pixels = 200,000,000 can take 2,673 MiB"),
    ],
)
def test_what_would_wait_for_ever_is_refused(settings: dict[str, Any], told: str) -> None:
    with pytest.raises(PreflightError, match=told):
        resolved(validate(TrainConfig, {**LEAST, **settings}), LAPTOP)


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"cpus_per_worker": 10}, "A worker of 1 GPUs and 10 CPUs fits no node: the largest has 3 and 8"),
        ({"gpus_per_worker": 4}, "A worker of 4 GPUs and 1 CPUs fits no node"),
        ({"workers": 8}, "A decode task of 1,024 MiB beside shuffling of 1,176 MiB fits no node: .* 2,000 MiB"),
    ],
)
def test_what_no_node_has_room_for_is_refused(settings: dict[str, Any], told: str) -> None:
    config = validate(TrainConfig, {**LEAST, "workers": {"workers": 2, **settings}})
    with pytest.raises(PreflightError, match=told):
        resolved(config, FARM)


@pytest.mark.parametrize(
    ("gpus", "batch_size", "workers"), [(3, 16, 2), (12, 16, 8), (12, 18, 9), (8, 64, 8), (5, 7, 1), (2, 2, 1)]
)
def test_of_the_gpus_as_many_have_a_worker_as_share_out_the_batch(gpus: int, batch_size: int, workers: int) -> None:
    config = validate(TrainConfig, {**LEAST, "optim": {"batch_size": batch_size}})
    cluster = Cluster(cpus=64, gpus=gpus, nodes=1, node_cpus=64, node_gpus=gpus)
    assert resolved(config, cluster).workers.workers == workers


@pytest.mark.parametrize(("workers", "threads"), [(1, 8), (4, 8), (8, 4)])
def test_a_worker_has_the_threads_of_its_share_of_a_node(workers: int, threads: int) -> None:
    config = validate(TrainConfig, {**LEAST, "data": {"shuffle": 1}, "workers": {"workers": workers}})
    assert resolved(config, FARM).workers.threads == threads


@pytest.mark.parametrize(
    ("model", "mean"),
    [
        ({"image_tower": "resnet152", "weights": "timm"}, 0.485),
        ({"image_tower": "resnet50", "weights": "weights.safetensors"}, 0.485),
        ({"image_tower": "mobilenetv1", "weights": "timm"}, 0.5),
        ({"image_tower": "resnet152"}, 0.5),
        ({"image_tower": "resnet152", "weights": "timm", "mean": (0.1, 0.1, 0.1)}, 0.1),
    ],
)
def test_images_are_normalised_as_the_weights_want_it(model: dict[str, Any], mean: float) -> None:
    assert matcher_config(validate(TrainConfig, {**LEAST, "model": model}).model, 0).mean[0] == mean
