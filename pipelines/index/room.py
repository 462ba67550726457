"""Whether what a build needs is there, in memory and on disk, asked before it starts."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Any

import ray

from pipelines.errors import IndexBuildError
from pipelines.index.attempt import Attempt
from pipelines.index.plan import Plan


class DiskFullError(IndexBuildError):
    """A disk without room for what a build writes: once there is, the same build goes on from where it was."""


def require_room(plan: Plan, attempt: Attempt) -> None:
    """A version that was only just claimed is given back where there is none. Raises: as `_require_room`."""
    try:
        _require_room(plan, attempt)
    except IndexBuildError:
        if not attempt.taken_up:
            attempt.clear()
        raise


def _require_room(plan: Plan, attempt: Attempt) -> None:
    """Raises: IndexBuildError where no node of the cluster has the memory for a task, which would wait for ever, or
    this machine's disks have no place for what a local output gets, or for what tasks write first."""
    nodes: list[dict[str, Any]] = ray.nodes()  # type: ignore[no-untyped-call]
    room = max((node["Resources"].get("memory", 0) for node in nodes if node["Alive"]), default=0)
    cpus = max((int(node["Resources"].get("CPU", 1)) for node in nodes if node["Alive"]), default=1)
    if plan.task_bytes > room:
        raise IndexBuildError(
            f"Filling an index shard needs {plan.task_bytes:,} bytes; the cluster's largest node gives {room:,.0f}",
            "Raise index.shards, choose a smaller index.index_key, or add memory.",
        )
    require_disks(plan, attempt.store.local_path(""), len(nodes), attempt.bytes, cpus)


def require_disks(plan: Plan, output: Path | None, nodes: int = 1, there: int = 0, cpus: int = 1) -> None:
    """output: the folder of a local one. nodes: of several, each checks its own scratch space in its tasks. there:
    bytes of the output that are in their place already. cpus: of one node, each of which may be filling at once."""
    needed: dict[Path, int] = {}
    if output is not None:
        needed[output] = max(0, plan.output_bytes - there)
    if nodes == 1:
        scratch = Path(tempfile.gettempdir())
        at_once = max(1, min(len(plan.runs), cpus))
        needed[scratch] = needed.get(scratch, 0) + at_once * plan.scratch_bytes
    require_free_disks(needed)


def require_free_disks(needed: dict[Path, int]) -> None:
    """needed: bytes that get into each folder; several may be on one disk. Raises: DiskFullError."""
    standing = [(_standing(folder), size) for folder, size in needed.items()]
    for folder, _ in standing:
        device = folder.stat().st_dev
        require_free_disk(folder, sum(size for other, size in standing if other.stat().st_dev == device))


def _standing(folder: Path) -> Path:
    """The folder, or the nearest above it that is there."""
    return next(each for each in (folder, *folder.parents) if each.exists())


def require_free_disk(folder: Path, needed: int) -> None:
    """Raises: DiskFullError where a disk has fewer free bytes."""
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise DiskFullError(
            f"The index needs about {needed:,} bytes on the disk of {folder}; {free:,} are free",
            "Free some, choose a smaller index.index_key, set index.rerank to int8 or none, or raise index.shards.",
        )
