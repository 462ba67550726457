"""Workers without Ray: on tables of colours with their names, small enough for a step in milliseconds."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from pipelines.config import validate
from pipelines.observe import Observe, nowhere
from pipelines.storage import Store
from pipelines.training.batches import Pair
from pipelines.training.examples import EXAMPLE
from pipelines.training.feed import Feed
from pipelines.training.loop import Task, Worker
from pipelines.training.place import Place
from pipelines.training.settings import TrainConfig
from pipelines.training.survey import Count, add_up

SIDE, COLOURS = 32, ("red", "green", "blue", "white")
PAINT = {"red": (220, 30, 30), "green": (30, 200, 30), "blue": (30, 30, 220), "white": (230, 230, 230)}
VIT = {"embed_dim": 16, "depth": 1, "num_heads": 2, "patch_size": 16, "img_size": SIDE}
MODEL: dict[str, Any] = {
    "image_tower": "vit_tiny_patch16_224", "image_arguments": VIT, "image_size": SIDE, "embed_dim": 8,
    "lstm_hidden": 6, "word_dim": 5, "max_words": 8, "dropout": 0.2,
}  # fmt: skip
NORMED = {**MODEL, "image_tower": "test_resnet", "image_arguments": {}}
"""With batch norms."""


def examples(count: int = 48, seed: int = 0) -> pa.Table:
    """Image and caption `at` are of the colour of a left and a right half; their identity is these two colours."""
    rng, rows = np.random.default_rng(seed), []
    for at in range(count):
        left, right = COLOURS[at % 4], COLOURS[at // 4 % 4]
        image = np.repeat(np.array([[PAINT[left], PAINT[right]]]), SIDE // 2, 1).repeat(SIDE, 0)
        pixels = np.clip(image + rng.integers(-25, 26, image.shape), 0, 255).astype(np.uint8)
        captions = [f"{left} beside {right}", f"number {at}: {left}, {right}"]
        rows.append({"key": f"k{at}", "identity": f"{left} {right}", "captions": captions, "pixels": pixels.tobytes()})
    return pa.Table.from_pylist(rows, EXAMPLE)


def config(output: Path, **more: Any) -> TrainConfig:
    """Four epochs of six steps by default. more: settings, sections on top of these."""
    settings: dict[str, Any] = {
        "input": "unread",
        "data": {"captions": "one", "val_input": "unread", "shuffle": 10},
        "model": MODEL,
        "loss": {"cmpm": 0, "cmpc": 0.2, "infonce": 1},
        "optim": {"epochs": 4, "batch_size": 8, "lr": 0.005, "ema": 0.9, "precision": "fp32"},
        "workers": {"workers": 1, "gpus_per_worker": 0, "threads": 1},
    }
    for name, section in more.items():
        settings[name] = {**settings.get(name, {}), **section}
    return validate(TrainConfig, {**settings, "output": str(output)})


def tables_of(train: pa.Table, val: pa.Table) -> Any:
    def tables(name: str, rows: int) -> Iterator[pa.Table]:
        whole = train if name == "train" else val
        yield from (whole.slice(at, rows) for at in range(0, len(whole), rows))

    return tables


def task(settings: TrainConfig, observe: Observe = nowhere, whole: pa.Table | None = None) -> Task:
    counts: Iterable[str] = Count(bool(settings.loss.cmpc))(examples() if whole is None else whole)[
        "counts"
    ].to_pylist()
    return Task(settings, add_up(counts, settings.model.vocab_size), Store(settings.output), observe)


def worker(settings: TrainConfig, observe: Observe = nowhere) -> Worker:
    place = Place(0, 1, torch.device("cpu"), tables_of(examples(), examples(16, seed=1)))
    return Worker(task(settings, observe), place)


def trained(settings: TrainConfig, observe: Observe = nowhere) -> Worker:
    """After its run."""
    ran = worker(settings, observe)
    for _ in ran.run():
        pass
    return ran


def weights(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


def figures(history: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Without the times that they took."""
    kept = [{name: value for name, value in told.items() if name != "seconds"} for told in history]
    for told in kept:
        if "evaluated" in told:
            told["evaluated"] = {name: value for name, value in told["evaluated"].items() if name != "seconds"}
    return kept


class Noting(Feed):
    """Keeps marks of the images that its worker is shown."""

    seen: list[str]

    def tensors(self, batch: list[Pair]) -> Any:
        self.seen = [*getattr(self, "seen", []), *(sha256(pair.pixels.tobytes()).hexdigest() for pair in batch)]
        return super().tensors(batch)
