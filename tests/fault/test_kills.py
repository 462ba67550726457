"""Killed with SIGKILL at every step of the protocol, and at random ones, and run again: nothing is lost or doubled.

A step is the moment that the store sees a given request. The README's table has a row for each of these steps.
"""

from __future__ import annotations

import os
import random
import re
import signal
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy as np
import psutil
import pytest

from pipelines.collect import collect
from pipelines.index.current import current_version
from pipelines.index.files import open_shard
from pipelines.index.release import read_release
from pipelines.index.versions import unfinished
from pipelines.verify import problems
from tests.fault.rig import Rig
from tests.fault.victims import TITLES, worker_of, workers
from tests.flow.command import TIMEOUT_S, Command, vecmill
from tests.flow.runs import rows
from tests.s3_proxy import Trap
from tests.traces import Sought, traces

pytestmark = pytest.mark.timeout(3 * TIMEOUT_S)

README = Path(__file__).parents[2] / "README.md"
MakeTrap = Callable[[Command], Trap]


def driver_dies(method: str, part_of_path: str, after: bool = False, at: int = 1) -> MakeTrap:
    """When the store sees the `at`-th such request of an output, or has answered it."""

    def trap(process: Command) -> Trap:
        def matches(path: str) -> bool:
            return bool(re.search(part_of_path, path)) and "/in/" not in path

        return Trap(method, matches, lambda: os.kill(process.pid, signal.SIGKILL), at, after)

    return trap


# By the row of the README's table.
STEPS: dict[str, dict[str, MakeTrap]] = {
    "while reading, decoding or encoding": {
        "before a fragment": driver_dies("PUT", r"/staging/clip/.*\.arrow$"),
    },
    "after some fragments": {
        "before a fragment, two being there": driver_dies("PUT", r"\.arrow$", at=3),
        "after a fragment, its acknowledgement lost": driver_dies("PUT", r"\.arrow$", after=True, at=2),
    },
    "while merging": {
        "after the samples part": driver_dies("PUT", r"/samples\.part$", after=True),
        "before the vectors": driver_dies("PUT", r"/embeddings_clip_image\.part$"),
        "before the rejects": driver_dies("PUT", r"/rejects_clip\.part$"),
        "after the rejects": driver_dies("PUT", r"/rejects_clip\.part$", after=True),
    },
    "just before the commit": {
        "of the vectors": driver_dies("PUT", "/commits/clip/"),
        "of the samples": driver_dies("PUT", "/commits/samples/"),
    },
    "after the commit, before or while parts are placed": {
        "the acknowledgement of the commit is lost": driver_dies("PUT", "/commits/clip/", after=True),
        "before the samples are placed": driver_dies("PUT", r"/samples/part-"),
        "between two parts": driver_dies("PUT", r"/embeddings/clip/", after=True),
        "before the rejects are placed": driver_dies("PUT", r"/rejects/clip/"),
    },
    "after the parts are placed": {
        "before the staging goes": driver_dies("DELETE", "/staging/clip/.*arrow$"),
        "while the staging goes": driver_dies("DELETE", "/staging/samples/", after=True, at=2),
    },
}


CHANGED = "while an older version of a changed shard is taken away"
RETIRING: dict[str, MakeTrap] = {
    "before the commit is noted": driver_dies("PUT", "/retired/"),
    "after the commit is noted": driver_dies("PUT", "/retired/", after=True),
    "before its samples go": driver_dies("DELETE", "/samples/part-"),
    "after its commit has gone": driver_dies("DELETE", "/commits/", after=True),
}
COMPACTED = "while a compaction writes parts without what was taken down"
COMPACTING: dict[str, MakeTrap] = {
    "before the commit": driver_dies("PUT", r"/commits/samples/.*\.1\.json$"),
    "after the commit, before the parts are placed": driver_dies("PUT", r"/commits/clip/.*\.1\.json$", after=True),
    "while the old ones go": driver_dies("DELETE", r"/embeddings/clip/.*\.0\.parquet$", after=True),
    "between two parts": driver_dies("PUT", r"/embeddings/clip/.*\.1\.parquet$", after=True),
}
SWAPPED = "after `CURRENT` points at it"
INDEXING: dict[str, dict[str, MakeTrap]] = {
    "while an index is filled": {
        "before an index shard": driver_dies("PUT", r"/shard-0001\.faiss$"),
        "after one is noted": driver_dies("PUT", r"/shard-\d+\.npz$", after=True),
        "before the manifest": driver_dies("PUT", r"/manifest\.json$"),
    },
    "after an index's manifest, before `CURRENT` points at it": {
        "after the manifest": driver_dies("PUT", r"/manifest\.json$", after=True),
        "before the swap": driver_dies("PUT", "/CURRENT$"),
    },
    SWAPPED: {"after the swap": driver_dies("PUT", "/CURRENT$", after=True)},
}


def test_the_readme_tells_of_each_of_these_steps() -> None:
    table = re.findall(r"^\| (while|after|just before)([^|]*) \|", README.read_text(), re.MULTILINE)
    told = {f"{first}{rest}" for first, rest in table}
    assert told == {*STEPS, CHANGED, COMPACTED, *INDEXING}


def killed_at(rig: Rig, output: str, steps: dict[str, MakeTrap]) -> None:
    """Each of the steps kills one run of the same command; the last one is left alone."""
    for step, trap in steps.items():
        status, printed = rig.run_and_check_reads(output, trap)
        assert status == -signal.SIGKILL, f"{step}: the trap did not spring:\n{printed}"
    status, printed = rig.run_and_check_reads(output)
    assert status == 0, printed
    rig.require_right(output)


SHORT = {
    "before a fragment, two being there": STEPS["after some fragments"]["before a fragment, two being there"],
    "after the samples part": STEPS["while merging"]["after the samples part"],
    "before the commit of the vectors": STEPS["just before the commit"]["of the vectors"],
    "the acknowledgement of the commit is lost": driver_dies("PUT", "/commits/clip/", after=True),
}


def test_a_run_killed_at_four_steps_ends_like_one_left_alone(rig: Rig) -> None:
    killed_at(rig, "killed", SHORT)


@pytest.mark.long
@pytest.mark.parametrize("row", STEPS)
def test_a_run_killed_at_every_step_ends_like_one_left_alone(rig: Rig, row: str) -> None:
    killed_at(rig, f"killed-{list(STEPS).index(row)}", STEPS[row])


@pytest.mark.long
@pytest.mark.parametrize("step", RETIRING)
def test_killed_while_an_older_version_is_taken_away(rig: Rig, step: str) -> None:
    """One of two shards changes; what stands in the end is what a run over the changed input alone gives."""
    name = f"retiring-{list(RETIRING).index(step)}"
    source, older = rig.store(f"{name}-in"), rig.store("in").names("")[:3]
    for target, origin in (("a.tar", older[0]), ("b.tar", older[1])):
        source.put_atomic(target, rig.store("in").read(origin))
    recipe = {"input": f"{source.root}/*.tar"}
    assert rig.run(name, **recipe)[0] == 0
    source.put_atomic("b.tar", rig.store("in").read(older[2]))
    status, printed = rig.run(name, RETIRING[step], **recipe)
    assert status == -signal.SIGKILL, f"the trap did not spring:\n{printed}"
    assert rig.run(name, **recipe)[0] == 0
    assert rig.run(f"{name}-reference", **recipe)[0] == 0
    rig.require_right(name, f"{name}-reference")


def test_a_compaction_killed_at_four_steps_ends_like_one_left_alone(rig: Rig) -> None:
    """Each of the steps kills one run of the same command; then nothing of the sample is left, and all else is."""
    store, reference = rig.store("compacted"), rig.store("reference")
    for name in reference.names(""):
        if not name.startswith(("index/", "leases/")):
            store.put_atomic(name, reference.read(name))
    sample = next(row for row in rows(store, "samples") if row["row"] == 5)
    image, text = (
        [row["embedding"] for row in rows(store, f"embeddings/clip/{modality}") if row["key"] == sample["key"]]
        for modality in ("image", "text")
    )
    what = Sought([sample["key"]], np.array([*image, *text], np.float32))
    assert len(image) == 1 and traces(store, what)
    command = ["remove", rig.recipe("compacted")]
    vecmill(*command, "--key", sample["key"])
    for step, trap in COMPACTING.items():
        status, printed = rig.run("compacted", trap, [*command, "--compact"])
        assert status == -signal.SIGKILL, f"{step}: the trap did not spring:\n{printed}"
    vecmill(*command, "--compact")
    assert traces(store, what) == set() and list(problems(store, deep=True)) == []
    for dataset in ("samples", "embeddings/clip/image", "rejects/clip"):
        ours, theirs = (
            [row for row in rows(one, dataset) if row["key"] != sample["key"]] for one in (store, reference)
        )
        assert sorted(map(str, ours)) == sorted(map(str, theirs))


@pytest.mark.long
@pytest.mark.parametrize(("row", "step"), [(row, step) for row, steps in INDEXING.items() for step in steps])
def test_an_index_that_was_killed_is_built_again(rig: Rig, row: str, step: str) -> None:
    """What was current stays so until the new one is whole."""
    store, home = rig.store("reference"), "index/clip/image"
    command = ["index", rig.recipe("reference"), "--shards", "2", "--force", "--address", rig.address]
    vecmill(*command)
    current = current_version(store, home)
    status, printed = rig.run("reference", INDEXING[row][step], command)
    assert status == -signal.SIGKILL, f"the trap did not spring:\n{printed}"
    assert (current_version(store, home) == current) == (row != SWAPPED)
    assert read_release(store, "clip", "image").version == current_version(store, home)
    begun = unfinished(store, home)
    vecmill(*command)
    assert not begun or read_release(store, "clip", "image").version in begun, "it goes on with the same version"
    collect(store)
    assert list(problems(store, deep=True)) == [] and not unfinished(store, home)
    release = read_release(store, "clip", "image")
    assert release.version != current
    assert sum(open_shard(store, release.folder, shard).ntotal for shard in release.shards) == release.parts.rows


class Killer:
    """Kills each kind of worker once, when the store sees a request of one that is at work. killed: their titles."""

    def __init__(self) -> None:
        self.killed: list[str] = []
        self._victim: tuple[str, psutil.Process] | None = None

    def trap(self, _: Command) -> Trap:
        return Trap("*", self._found, self._kill, every=True)

    def _found(self, _: str) -> bool:
        left = [title for title in TITLES if title not in self.killed]
        self._victim = next(((title, worker) for title in left if (worker := worker_of(title))), None)
        return self._victim is not None

    def _kill(self) -> None:
        assert self._victim
        title, worker = self._victim
        worker.kill()
        self.killed.append(title)


def test_workers_that_are_killed_are_replaced(rig: Rig) -> None:
    killer = Killer()
    status, printed = rig.run("workers", killer.trap)
    assert status == 0, printed
    assert {*killer.killed} >= {*TITLES} - {"ray::MapBatches(Decode)"}, "some were never at work when seen"
    rig.require_right("workers")


def test_a_finished_run_reads_nothing_again_and_a_new_shard_alone(rig: Rig) -> None:
    with rig.another_shard():
        status, printed = rig.run_and_check_reads("killed")
        assert status == 0 and f"1 shards embedded, {rig.shards} were done before" in printed


class AtRandom:
    """Kills the driver, or one to three workers at once, at a random request of a run. killed: their titles."""

    def __init__(self, seed: int) -> None:
        self._random, self.killed, self.moments = random.Random(seed), Counter[str](), 0

    def trap(self, process: Command) -> Trap:
        kill = self._random.choice([lambda: os.kill(process.pid, signal.SIGKILL), self._kill_workers])
        self._drivers = kill != self._kill_workers

        def spring() -> None:
            self.moments += 1
            self.killed["driver"] += self._drivers
            kill()

        return Trap("*", lambda path: True, spring, self._random.randint(10, 150))

    def _kill_workers(self) -> None:
        alive = workers()
        for title, worker in self._random.sample(alive, min(self._random.randint(1, 3), len(alive))):
            with suppress(psutil.Error):
                worker.kill()
                self.killed[title] += 1


@pytest.mark.long
def test_killed_at_thirty_random_moments(rig: Rig) -> None:
    """One output after the other; each is run until it is done."""
    at_random, outputs = AtRandom(3), 0
    while at_random.moments < 30:
        status, printed = rig.run_and_check_reads(f"random-{outputs}", at_random.trap)
        assert status in (0, -signal.SIGKILL), printed
        if status == 0:
            rig.require_right(f"random-{outputs}")
            outputs += 1
    assert rig.run(f"random-{outputs}")[0] == 0
    rig.require_right(f"random-{outputs}")
    assert set(at_random.killed) >= {"driver", "ray::MapWorker(MapBatches(Encode)"}
    print(at_random.moments, dict(at_random.killed), outputs)
