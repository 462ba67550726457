"""Two workers, in two processes that gloo connects, without Ray."""

from __future__ import annotations

import json
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import multiprocessing

from pipelines.training.loop import Worker
from pipelines.training.place import Place
from pipelines.training.validation import validate
from tests.unit.training.runs import NORMED, SIDE, Noting, config, examples, figures, tables_of, task

multiprocessing.set_forkserver_preload(["tests.unit.training.runs"])

WORKERS, EPOCHS, EACH = 2, 2, 4
FIRST_HAS = 27
"""Of 48 examples: six batches of four, and the second worker has five."""
STEPS = (48 - FIRST_HAS) // EACH
SETTINGS: dict[str, Any] = {
    "model": NORMED, "optim": {"epochs": EPOCHS, "frozen_epochs": 1}, "checkpoint": {"every_steps": 3},
}  # fmt: skip


def of_one_worker(rank: int, folder: str, epochs: int) -> None:
    """As many epochs as it is told, or all."""
    torch.set_num_threads(1)
    meet = f"file://{folder}/meet-{epochs}"
    torch.distributed.init_process_group("gloo", init_method=meet, rank=rank, world_size=WORKERS)
    own = examples().slice(0, FIRST_HAS) if rank == 0 else examples().slice(FIRST_HAS)
    place = Place(rank, WORKERS, torch.device("cpu"), tables_of(own, examples(16, seed=1)))
    ran = Worker(task(config(Path(folder), **SETTINGS)), place)
    ran.feed = noting = Noting(ran.config, ran.task.matcher, ran.task.survey, place)
    began, _ = ran.position, list(islice(ran.run(), epochs))
    told = {
        "began": began, "seen": noting.seen, "weights": dict(ran.network.named_parameters()),
        "history": figures(ran.history), "again": validate(ran.evaluated, (SIDE, SIDE), 16, noting, place),
        "statistics": dict(ran.evaluated.named_buffers()),
    }  # fmt: skip
    torch.save(told, f"{folder}/rank-{rank}.pt")
    torch.distributed.destroy_process_group()


def both(folder: Path, epochs: int) -> list[dict[str, Any]]:
    """What each of them tells."""
    multiprocessing.start_processes(of_one_worker, (str(folder), epochs), WORKERS, start_method="forkserver")
    return [torch.load(folder / f"rank-{rank}.pt", weights_only=False) for rank in range(WORKERS)]


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return both(tmp_path_factory.mktemp("workers"), EPOCHS)


def test_they_take_as_many_steps_and_no_image_twice_in_an_epoch(straight: list[dict[str, Any]]) -> None:
    for epoch in range(EPOCHS):
        shown = [mark for each in straight for mark in each["seen"][epoch * STEPS * EACH : (epoch + 1) * STEPS * EACH]]
        assert len(shown) == len(set(shown)) == WORKERS * STEPS * EACH
    assert all(len(each["seen"]) == EPOCHS * STEPS * EACH for each in straight)
    assert [told["pairs"] for told in straight[0]["history"]] == [WORKERS * STEPS * EACH] * EPOCHS


def test_they_end_with_equal_weights_and_one_evaluation(straight: list[dict[str, Any]]) -> None:
    first, second = straight
    for kind in ("weights", "statistics"):
        assert all(torch.equal(second[kind][name], value) for name, value in first[kind].items())
    assert [told["evaluated"] for told in first["history"]] == [{"images": 16, "captions": 32}] * EPOCHS
    assert not any("evaluated" in told for told in second["history"])
    for direction in ("text_to_image", "image_to_text"):
        assert first["again"][direction] == first["history"][-1][direction]


def test_stopped_and_continued_they_end_the_same(straight: list[dict[str, Any]], tmp_path: Path) -> None:
    both(tmp_path, 1)
    names = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert names == ["epoch-00000-step-00000003.pt", "epoch-00001.pt"]
    assert not json.loads((tmp_path / "metrics.json").read_text())["finished"]
    continued = both(tmp_path, EPOCHS)
    assert [each["began"] for each in continued] == [(1, 0)] * WORKERS
    assert continued[0]["history"] == straight[0]["history"]
    for name, value in straight[0]["weights"].items():
        assert torch.equal(continued[0]["weights"][name], value), name
