"""One job over several nodes, and with nodes killed under it: the rows are those of a run on one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from pipelines.collect import collect, leftovers
from pipelines.scenes import write_shards
from pipelines.storage import Store
from tests.flow.command import TIMEOUT_S
from tests.flow.outputs import assert_same
from tests.flow.runs import embedded, settings

pytestmark = [pytest.mark.timeout(2 * TIMEOUT_S), pytest.mark.long]

SHARDS, SAMPLES = 8, 160
# A killed node is noticed soon, and a slow machine's is not taken for dead.
HEALTH = {"RAY_health_check_period_ms": "1000", "RAY_health_check_failure_threshold": "5"}
# The node that dies is the encoder's, with whatever else it was doing.
AT_RANDOM = {f"at random {seed}": seed for seed in range(4)}
KILLED = {"left alone": None, "killed": "ray::MapWorker(MapBatches(Encode", **AT_RANDOM}


@dataclass(frozen=True)
class Ended:
    reference: Store
    folder: Path
    runs: dict[str, dict[str, Any]]

    def store(self, case: str) -> Store:
        return Store(str(self.folder / case))


@pytest.fixture(scope="module")
def ended(ray_local: str, checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Ended:
    """All cases, one after the other on one cluster."""
    folder = tmp_path_factory.mktemp("nodes")
    write_shards(folder / "in", SAMPLES, SHARDS, broken=6)
    where = str(folder / "in" / "*.tar")
    jobs = [{"recipe": settings(where, folder / case, checkpoint), "kill": title} for case, title in KILLED.items()]
    (folder / "jobs.json").write_text(json.dumps(jobs))
    command = [sys.executable, "-m", "tests.fault.nodes", str(folder / "jobs.json")]
    done = subprocess.run(command, env=os.environ | HEALTH, capture_output=True, text=True, timeout=2 * TIMEOUT_S)
    assert done.returncode == 0, done.stderr[-8000:]
    # Ray prints there too.
    (printed,) = (line for line in done.stdout.splitlines() if line.startswith("[{"))
    reference, _ = embedded(settings(where, folder / "reference", checkpoint))
    return Ended(reference, folder, dict(zip(KILLED, json.loads(printed), strict=True)))


def test_shards_are_read_on_several_nodes(ended: Ended) -> None:
    assert ended.runs["left alone"]["nodes"]["ReadReadShards"] > 1


def test_a_node_died_in_the_middle(ended: Ended) -> None:
    (done,) = ended.runs["killed"]["done"]
    assert 0 < done < SHARDS


def test_nodes_died_at_random_moments(ended: Ended) -> None:
    done = [shards for case in AT_RANDOM for shards in ended.runs[case]["done"]]
    print(done)
    assert all(ended.runs[case]["done"] for case in AT_RANDOM) and any(0 < shards < SHARDS for shards in done)
    assert len(set(done)) > 2


@pytest.mark.parametrize("case", KILLED)
def test_the_rows_are_those_of_one_node(ended: Ended, case: str) -> None:
    # A process that dies while it writes to a disk leaves a temporary file: an orphan, as after any kill.
    assert {leftover.kind for leftover in collect(ended.store(case))} <= {"orphan"}
    assert_same(ended.store(case), ended.reference)
    assert leftovers(ended.store(case)) == []
    assert ended.runs[case]["items"]["image"]["items"] == SAMPLES
