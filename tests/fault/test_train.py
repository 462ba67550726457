"""Several workers on Ray, whole, and killed and continued: as good as one, within the spread of three seeds."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipelines.scenes import write_shards
from pipelines.storage import Store
from pipelines.training.checkpoint import checkpoints
from tests.flow.command import TIMEOUT_S, Command, vecmill

pytestmark = [pytest.mark.long, pytest.mark.timeout(6 * TIMEOUT_S)]

SCENES, EPOCHS = 600, 5
RECIPE: dict[str, Any] = {
    "data": {"flip": False, "cache": True, "captions": "one", "split": {"train": 0.75, "val": 0.25, "test": 0.0}},
    "model": {
        "image_tower": "test_resnet", "image_size": 48, "embed_dim": 32, "lstm_hidden": 32, "word_dim": 32,
        "max_words": 40, "dropout": 0.1,
    },
    "loss": {"cmpm": 0, "cmpc": 0, "infonce": 1},
    "optim": {"epochs": EPOCHS, "batch_size": 32, "lr": 0.002, "ema": 0.9, "clip_norm": 1.0},
    "checkpoint": {"every_steps": 5},
}  # fmt: skip


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("train") / "shards"
    write_shards(folder, SCENES, 4, seed=21, broken=0)
    return folder


def recipe(shards: Path, name: str, seed: int, workers: int) -> str:
    told = {
        **RECIPE, "input": str(shards), "output": str(shards.parent / name), "optim": {**RECIPE["optim"], "seed": seed},
        "workers": {"workers": workers, "threads": 1},
    }  # fmt: skip
    path = shards.parent / f"{name}.yaml"
    path.write_text(yaml.safe_dump(told))
    return str(path)


def figures(shards: Path, name: str) -> dict[str, float]:
    """Of the last epoch, and how much the loss has fallen."""
    told = json.loads((shards.parent / name / "metrics.json").read_text())["epochs"]
    last = told[-1]
    return {
        "loss": last["loss"],
        "fallen": told[0]["loss"] - last["loss"],
        "recall@10": (last["text_to_image"]["recall@10"] + last["image_to_text"]["recall@10"]) / 2,
    }


def kill_midway(path: str, output: Path, address: str) -> None:
    run, deadline = Command(["train", path, "--address", address]), time.monotonic() + TIMEOUT_S
    while not any(at >= (1, 1) for at in checkpoints(Store(str(output)))):
        assert run.is_running and time.monotonic() < deadline
        time.sleep(0.05)
    os.kill(run.pid, signal.SIGKILL)
    assert run.wait()[0] == -signal.SIGKILL


def test_two_workers_are_as_good_as_one_also_after_a_kill(shards: Path, ray_local: str) -> None:
    for seed in range(3):
        vecmill("train", recipe(shards, f"seed-{seed}", seed, 1), "--address", ray_local)
    vecmill("train", recipe(shards, "two", 0, 2), "--address", ray_local)
    killed = recipe(shards, "killed", 0, 2)
    kill_midway(killed, shards.parent / "killed", ray_local)
    assert "going on from their checkpoint" in vecmill("train", killed, "--address", ray_local)
    seeds = [figures(shards, f"seed-{seed}") for seed in range(3)]
    found = {name: figures(shards, name) for name in ("two", "killed")}
    print(json.dumps({"seeds": seeds, **found}, indent=2))
    for name in ("loss", "recall@10"):
        values = [each[name] for each in seeds]
        spread = max(values) - min(values)
        for workers, figure in found.items():
            assert min(values) - spread <= figure[name] <= max(values) + spread, (workers, name, seeds, found)
    assert all(each["fallen"] > 0.5 for each in [*seeds, *found.values()])
