"""Killed with SIGKILL at the moment the store sees a given request, and run again: nothing is lost or doubled."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
import yaml

from pipelines.ledger import list_commits
from pipelines.scenes import write_shards
from pipelines.storage import Store
from tests.flow.command import Command
from tests.flow.outputs import assert_same, datasets
from tests.s3_proxy import S3Proxy, Trap

SHARDS, SAMPLES = 4, 100


@pytest.fixture(scope="module")
def proxy(object_store: str) -> Iterator[S3Proxy]:
    with S3Proxy(object_store) as proxy:
        yield proxy


class Runs:
    """The same `vecmill embed` command, as a process of its own each time."""

    def __init__(self, folder: Path, checkpoint: Path, proxy: S3Proxy, address: str) -> None:
        self.options = {"s3": {"endpoint_url": proxy.url, "key": "testkey", "secret": "testsecret"}}
        self._folder, self._checkpoint, self._address, self.proxy = folder, checkpoint, address, proxy
        self._fill_bucket()
        status, printed = self.run("reference")
        assert status == 0, printed

    def _fill_bucket(self) -> None:
        fs = __import__("s3fs").S3FileSystem(**self.options["s3"])
        fs.mkdir("resume")
        for path in write_shards(self._folder / "shards", SAMPLES, SHARDS, broken=6):
            fs.put_file(str(path), f"resume/in/{path.name}")

    def store(self, output: str) -> Store:
        return Store(f"s3://resume/{output}", self.options)

    def start(self, output: str) -> Command:
        recipe = self._folder / f"{output}.yaml"
        settings = {
            "input": "s3://resume/in/*.tar",
            "output": f"s3://resume/{output}",
            "encoder": f"open_clip:local-dir:{self._checkpoint}",
            "name": "clip",
            "modalities": "image",
            "read": {"rows_per_block": 10},
            "decode": {"rows_per_task": 10},
            "encode": {"batch_size": 8, "threads": 1},
            "write": {"rows_per_task": 10, "reject_ceiling": 0.5},
            "storage": self.options,
        }
        recipe.write_text(yaml.safe_dump(settings))
        return Command(["embed", str(recipe), "--address", self._address])

    def run(self, output: str, trap: Callable[[Command], Trap] | None = None) -> tuple[int, str]:
        """Exit status and what was printed. With a trap, until the process has died of it."""
        process = self.start(output)
        self.proxy.trap = trap(process) if trap else None
        ended = process.wait()
        self.proxy.trap = None
        return ended


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, checkpoint: Path, proxy: S3Proxy, ray_local: str) -> Runs:
    """With an output `reference` of a run that was left alone."""
    return Runs(tmp_path_factory.mktemp("runs"), checkpoint, proxy, ray_local)


def driver_dies(method: str, part_of_path: str, after: bool = False, at: int = 1) -> Callable[..., Trap]:
    def trap(process: Command) -> Trap:
        def matches(path: str) -> bool:
            return part_of_path in path and "/killed/" in path

        return Trap(method, matches, lambda: os.kill(process.pid, signal.SIGKILL), at, after)

    return trap


def worker_dies(output: str, title: str) -> Callable[..., Trap]:
    """The first worker whose Ray title holds `title` dies when the store sees the output's third fragment."""

    def spring() -> None:
        for process in psutil.process_iter(["cmdline"]):
            if title in " ".join(process.info["cmdline"] or []):
                process.kill()
                return

    return lambda _: Trap("PUT", lambda path: f"/{output}/staging/" in path and path.endswith(".arrow"), spring, at=3)


STEPS = {
    "after a merged part": driver_dies("PUT", ".part", after=True, at=2),
    "before a commit": driver_dies("PUT", "/commits/clip/", at=1),
    "after a commit, its acknowledgement lost": driver_dies("PUT", "/commits/samples/", after=True, at=1),
    "before a part is placed": driver_dies("PUT", "/killed/embeddings/", at=1),
}


def finished_shards(store: Store) -> set[str]:
    both = [{ref.shard for ref in list_commits(store, family)} for family in ("samples", "clip")]
    return both[0] & both[1]


def test_a_run_killed_at_each_step_ends_like_one_left_alone(runs: Runs) -> None:
    store, killed = runs.store("killed"), 0
    for step, trap in STEPS.items():
        finished, before = finished_shards(store), runs.proxy.bytes_read.copy()
        status, printed = runs.run("killed", trap)
        killed += status == -signal.SIGKILL
        assert status in (0, -signal.SIGKILL), f"{step}: {printed}"
        assert_not_read(runs.proxy, before, finished)
    assert killed == len(STEPS), "a trap did not spring"
    status, printed = runs.run("killed")
    assert status == 0, printed
    assert_same(store, runs.store("reference"))
    assert store.names("staging") == []
    assert len(datasets(store)["samples"]) == SHARDS


def assert_not_read(proxy: S3Proxy, before: dict[str, int], shards: set[str]) -> None:
    for path, count in proxy.bytes_read.items():
        name = path.rpartition("/")[2].removesuffix(".tar")
        if "/in/" in path and any(shard.startswith(f"{name}-") for shard in shards):
            assert count == before.get(path, 0), f"{path} was read again although its shard was finished"


@pytest.mark.parametrize("title", ["ray::MapWorker(MapBatches(Encode)", "ray::Write"])
def test_a_worker_that_is_killed_is_replaced(runs: Runs, title: str) -> None:
    output = title.rpartition(":")[2][:5]
    status, printed = runs.run(output, worker_dies(output, title))
    assert status == 0, printed
    assert_same(runs.store(output), runs.store("reference"))


def test_a_finished_run_reads_nothing_again(runs: Runs) -> None:
    before = runs.proxy.bytes_read.copy()
    status, printed = runs.run("reference")
    assert status == 0 and "4 were done before" in printed
    read_again = runs.proxy.bytes_read - before
    assert not [path for path in read_again if "/in/" in path]
