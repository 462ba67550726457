"""A cluster whose object store is full, and so is the disk that it spills to: another job holds all of it."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from pipelines.scenes import write_shards
from pipelines.storage import Store
from tests.fault.disks import disk_of
from tests.flow.command import TIMEOUT_S, Command, vecmill
from tests.flow.outputs import assert_same
from tests.flow.runs import embedded, settings, write_recipe

pytestmark = [pytest.mark.timeout(3 * TIMEOUT_S), pytest.mark.long]


@contextmanager
def neighbour(spill: Path) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """The other job, and the address of the cluster that it has filled."""
    command = [sys.executable, "-m", "tests.fault.neighbour", str(spill)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield process, said(process, "held").split()[-1]
        finally:
            process.communicate("\n\n", TIMEOUT_S)


def said(process: subprocess.Popen[str], word: str) -> str:
    """Ray prints there too."""
    assert process.stdout
    return next(line for line in process.stdout if line.startswith(word))


def test_a_full_object_store_is_named_and_room_lets_the_run_go_on(
    ray_local: str, checkpoint: Path, tmp_path: Path
) -> None:
    write_shards(tmp_path / "in", 100, 4)
    shards = str(tmp_path / "in" / "*.tar")
    reference, _ = embedded(settings(shards, tmp_path / "reference", checkpoint))
    recipe = write_recipe(tmp_path / "run.yaml", settings(shards, tmp_path / "out", checkpoint))
    with disk_of("100m", tmp_path / "spill") as spill, neighbour(spill) as (process, address):
        command = ["embed", recipe, "--address", address]
        status, printed = Command(command).wait()
        assert status == 1 and "Traceback" not in printed, printed
        assert "Ray's object store is full, and so is the disk that it spills to" in printed
        assert process.stdin
        process.stdin.write("\n")
        process.stdin.flush()
        said(process, "free")
        vecmill(*command)
    assert_same(Store(str(tmp_path / "out")), reference)
