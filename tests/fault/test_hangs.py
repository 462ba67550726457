"""Nothing waits for ever: a stage that stalls, a process that keeps dying and a full store each end in an error that
names them, and a run that is told to stop does."""

from __future__ import annotations

import os
import re
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import psutil
import pytest

from pipelines.ledger import list_commits
from tests.fault.rig import Rig
from tests.fault.victims import worker_of
from tests.flow.command import TIMEOUT_S, Command
from tests.s3_proxy import Chaos, Trap

pytestmark = pytest.mark.timeout(2 * TIMEOUT_S)

# Ten seconds are promised, and as many more given to a busy machine.
STOP_S = 20


def await_first(begun: threading.Event, process: Command) -> None:
    """Until it has begun; a run that ends before is not waited for."""
    while not begun.wait(1):
        assert process.is_running, process.wait()[1]


def groups(processes: list[psutil.Process]) -> set[int]:
    """Of those that live."""
    found = set()
    for each in processes:
        with suppress(ProcessLookupError):
            found.add(os.getpgid(each.pid))
    return found


@pytest.mark.parametrize(
    "number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.long)], ids=lambda number: number.name
)
def test_a_run_that_is_stopped_keeps_what_is_committed_and_says_how_to_go_on(rig: Rig, number: signal.Signals) -> None:
    """With a Ray of its own, which a signal to the terminal's process group must not reach before the run has ended it:
    a driver whose node is gone may end on the spot."""
    output, begun = f"stopped-{number.name}", threading.Event()
    process = Command(["embed", rig.recipe(output)], alone=True)
    with rig.proxy.set(Trap("PUT", lambda path: "/commits/clip/" in path, begun.set, after=True)):
        await_first(begun, process)
        rays = psutil.Process(process.pid).children(recursive=True)
        assert rays and process.pid not in groups(rays)
        os.killpg(process.pid, number)
        status, printed = process.wait(STOP_S)
    assert status == 128 + number, printed
    assert psutil.wait_procs(rays, STOP_S)[1] == []
    assert "What is committed stays; run the same command to go on." in printed and "Traceback" not in printed
    assert list(list_commits(rig.store(output), "clip")) and rig.store(output).names("leases") == []


@pytest.mark.long
def test_a_run_that_was_stopped_goes_on(rig: Rig) -> None:
    output = f"stopped-{signal.SIGTERM.name}"
    assert rig.finished(output) or rig.store(output).names("commits")
    status, printed = rig.run_and_check_reads(output)
    assert status == 0 and "vecmill" not in printed, printed
    rig.require_right(output)


@pytest.mark.long
def test_a_run_is_stopped_although_its_store_is_silent(rig: Rig) -> None:
    begun = threading.Event()

    def silent(method: str, path: str) -> bool:
        if method == "PUT" and path.endswith(".arrow"):
            begun.set()
        return begun.is_set()

    process = Command(["embed", rig.recipe("mute")], alone=True)
    rig.proxy.chaos = Chaos(1.0, ("stall",), matches=silent, stall_s=900)
    try:
        await_first(begun, process)
        os.killpg(process.pid, signal.SIGINT)
        status, printed = process.wait(STOP_S)
    finally:
        rig.proxy.chaos = None
    assert status == 128 + signal.SIGINT and "run the same command to go on" in printed, printed


@pytest.mark.long
def test_a_stage_that_stalls_is_named(rig: Rig) -> None:
    """The store takes every request for a shard, and says nothing."""
    silent = Chaos(1.0, ("stall",), matches=lambda method, path: method == "GET" and path.endswith(".tar"), stall_s=900)
    patient = {"storage": rig.impatient(900), "cluster": {"no_progress_timeout_s": 60}}
    status, printed = rig.run("silent", chaos=silent, **patient)
    assert status == 1 and "Traceback" not in printed, printed
    assert re.search(r"Nothing has moved for 60 s\. Stalled: read \(\d tasks\)\. 4 shards are not done: s3://", printed)
    assert rig.run("silent")[0] == 0
    rig.require_right("silent")


@contextmanager
def dying(title: str) -> Iterator[list[int]]:
    """Kills every process of that title as soon as it is seen, while the block runs. Yields their numbers."""
    over, killed = threading.Event(), list[int]()

    def kill() -> None:
        while not over.wait(0.05):
            worker = worker_of(title)
            if worker and worker.pid not in killed:
                worker.kill()
                killed.append(worker.pid)

    thread = threading.Thread(target=kill)
    thread.start()
    try:
        yield killed
    finally:
        over.set()
        thread.join()


@pytest.mark.long
def test_an_actor_that_cannot_start_is_named(rig: Rig) -> None:
    with dying("ray::MapWorker(MapBatches(Encode)") as killed:
        status, printed = rig.run("dying", cluster={"no_progress_timeout_s": 120})
    assert status == 1 and "Traceback" not in printed and len(killed) > 1, printed
    assert "encode has no task at work: its processes do not start" in printed or "The encode actor" in printed
    assert rig.run("dying")[0] == 0
    rig.require_right("dying")
