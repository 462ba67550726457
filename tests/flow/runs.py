"""Runs of the embed job, in this process or from a recipe."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import yaml

from pipelines.config import RunConfig, validate
from pipelines.embed import Report, embed
from pipelines.prepare import Cluster, prepare
from pipelines.storage import Store
from tests.flow.outputs import datasets, read_part

# Blocks small enough that those of several shards meet, and that one shard comes in several.
SMALL: dict[str, Any] = {
    "name": "clip",
    "read": {"rows_per_block": 10},
    "decode": {"rows_per_block": 10},
    "encode": {"batch_size": 8, "threads": 1},
    "write": {"rows_per_task": 10, "reject_ceiling": 0.5},
}


def settings(input: str | list[str], output: str | Path, checkpoint: Path, **more: Any) -> dict[str, Any]:
    """Of a small run with an open_clip local-dir."""
    return {
        **SMALL,
        "input": input,
        "output": str(output),
        "encoder": f"open_clip:local-dir:{checkpoint}",
        **more,
    }


def embedded(recipe: dict[str, Any]) -> tuple[Store, Report]:
    """The output of a run in this process, on the Ray that is connected, and the run's report."""
    config = validate(RunConfig, recipe)
    run = prepare(config, Cluster(cpus=4, gpus=0, nodes=1, node_cpus=4))
    return run.store, embed(run)


def write_recipe(path: Path, recipe: dict[str, Any]) -> str:
    path.write_text(yaml.safe_dump(recipe))
    return str(path)


def rows(store: Store, dataset: str) -> Iterator[dict[str, Any]]:
    """Of all parts of a data set, in the order of the parts' names."""
    for part in datasets(store).get(dataset, []):
        table: pa.Table = read_part(store, f"{dataset}/{part}")
        yield from table.to_pylist()
