"""Killed with SIGKILL at the moment the store sees a given request, and run again: nothing is lost or doubled."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import suppress
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

SHARDS, SAMPLES = 4, 125


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
        *first, self._last = write_shards(self._folder / "shards", SAMPLES, SHARDS + 1, broken=6)
        for path in first:
            fs.put_file(str(path), f"resume/in/{path.name}")

    def add_a_shard(self) -> None:
        self.store("in").put_atomic(self._last.name, self._last.read_bytes())

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
            "decode": {"rows_per_block": 10},
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


STEPS = {
    "before a fragment": driver_dies("PUT", ".arrow", at=3),
    "after a merged part": driver_dies("PUT", ".part", after=True, at=2),
    "before a commit": driver_dies("PUT", "/commits/clip/"),
    "after a commit, its acknowledgement lost": driver_dies("PUT", "/commits/samples/", after=True),
    "before a part is placed": driver_dies("PUT", "/killed/embeddings/"),
}


# Each dies once, when the store sees a request with this in its path while it is at work.
WORKERS = {
    "ray::ReadReadShards": "/in/",
    "ray::MapWorker(MapBatches(Encode)": ".arrow",
    "ray::Write": ".arrow",
}


class Killer:
    """Kills workers of this process's own Ray. killed: their titles."""

    def __init__(self) -> None:
        self.killed: list[str] = []
        self._victim: tuple[str, psutil.Process] | None = None

    def trap(self, _: Command) -> Trap:
        return Trap("*", self._found, self._kill, every=True)

    def _found(self, path: str) -> bool:
        wanted = [title for title, part in WORKERS.items() if part in path and title not in self.killed]
        self._victim = next(((title, worker) for title in wanted if (worker := worker_of(title))), None)
        return self._victim is not None

    def _kill(self) -> None:
        assert self._victim
        title, worker = self._victim
        worker.kill()
        self.killed.append(title)


def worker_of(title: str) -> psutil.Process | None:
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):
            if title in " ".join(process.cmdline()):
                return process
    return None


def finished_shards(store: Store) -> set[str]:
    both = [{ref.shard for ref in list_commits(store, family)} for family in ("samples", "clip")]
    return both[0] & both[1]


def test_a_run_killed_at_each_step_ends_like_one_left_alone(runs: Runs) -> None:
    store, killed = runs.store("killed"), 0
    for step, trap in STEPS.items():
        status, printed = run_and_check_reads(runs, "killed", trap)
        killed += status == -signal.SIGKILL
        assert status in (0, -signal.SIGKILL), f"{step}: {printed}"
    assert killed == len(STEPS), "a trap did not spring"
    status, printed = run_and_check_reads(runs, "killed")
    assert status == 0, printed
    assert_same(store, runs.store("reference"))
    assert store.names("staging") == []
    assert len(datasets(store)["samples"]) == SHARDS


def run_and_check_reads(runs: Runs, output: str, trap: Callable[[Command], Trap] | None = None) -> tuple[int, str]:
    """A run that reads nothing of the shards that were finished before it."""
    finished, before = finished_shards(runs.store(output)), runs.proxy.bytes_read.copy()
    ended = runs.run(output, trap)
    for path, count in runs.proxy.bytes_read.items():
        name = path.rpartition("/")[2].removesuffix(".tar")
        if "/in/" in path and any(shard.startswith(f"{name}-") for shard in finished):
            assert count == before.get(path, 0), f"{path} was read again although its shard was finished"
    return ended


def test_workers_that_are_killed_are_replaced(runs: Runs) -> None:
    killer = Killer()
    status, printed = runs.run("workers", killer.trap)
    assert status == 0, printed
    assert sorted(killer.killed) == sorted(WORKERS)
    assert_same(runs.store("workers"), runs.store("reference"))


def test_a_finished_run_reads_nothing_again_and_one_with_a_new_shard_that_alone(runs: Runs) -> None:
    before = runs.proxy.bytes_read.copy()
    status, printed = runs.run("reference")
    assert status == 0 and "0 shards embedded, 4 were done before" in printed
    assert not [path for path in runs.proxy.bytes_read - before if "/in/" in path]
    runs.add_a_shard()
    status, printed = run_and_check_reads(runs, "reference")
    assert status == 0 and "1 shards embedded, 4 were done before" in printed
