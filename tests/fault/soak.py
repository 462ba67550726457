"""A long run under steady faults: `python -m tests.fault.soak --shards 300 --minutes 15`.

Many small shards, a small model, an S3 server behind a proxy that spoils 2 % of all requests, and a random worker
killed every few seconds; then a run without faults over the same shards, to compare with. Prints a table of memory
over time, of the driver and of the largest worker, and what was done; ends with 1 where anything is not exact, or memory grows.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from pipelines.collect import collect
from pipelines.verify import problems
from tests import ceph, conftest
from tests.checkpoints import save_open_clip
from tests.fault.rig import Rig
from tests.fault.victims import TITLES, workers
from tests.flow.command import Command
from tests.flow.outputs import assert_same
from tests.s3_proxy import Chaos, S3Proxy
from tests.s3_server import s3_server

SAMPLES_PER_SHARD = 16
RATE, KILL_EVERY_S, LOOK_EVERY_S, GROWTH = 0.02, 20.0, 5.0, 1.25
MIB = 2**20


@dataclass
class Watch:
    """Memory over time, in MiB, and the kills."""

    driver: int
    seed: int
    started: float = field(default_factory=time.monotonic)
    looks: list[tuple[float, float, float, int]] = field(default_factory=list)
    killed: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._over, self._random = threading.Event(), random.Random(self.seed)
        self._threads = [
            threading.Thread(target=self._every, args=(LOOK_EVERY_S, self._look)),
            threading.Thread(target=self._every, args=(KILL_EVERY_S, self._kill)),
        ]

    def __enter__(self) -> Watch:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        for thread in self._threads:
            thread.join()

    def _every(self, seconds: float, act: Any) -> None:
        while not self._over.wait(seconds):
            with suppress(psutil.Error):
                act()

    def _look(self) -> None:
        at_work = [own_mib(worker.pid) for _, worker in workers()]
        self.looks.append(
            (time.monotonic() - self.started, own_mib(self.driver), max(at_work, default=0.0), len(at_work))
        )

    def _kill(self) -> None:
        alive = workers()
        if alive:
            title, victim = self._random.choice(alive)
            victim.kill()
            self.killed.append(title)

    def grown(self) -> dict[str, float]:
        """How many times as much memory the last third of the run took at most as the middle third."""
        third = max(1, len(self.looks) // 3)
        middle, last = self.looks[third:-third], self.looks[-third:]
        return {
            name: max(look[column] for look in last) / max(look[column] for look in middle)
            for name, column in (("driver", 1), ("largest worker", 2))
        }


def own_mib(pid: int) -> float:
    """Memory of a process without the object store's pages, which it only maps."""
    memory = psutil.Process(pid).memory_info()
    return (memory.rss - memory.shared) / MIB


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--shards", type=int, default=300)
    parser.add_argument("--minutes", type=float, default=15.0, help="end with an error after this")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with rig_of(options.shards) as rig:
        exact = soak(rig, options.minutes * 60, options.seed)
    sys.exit(0 if exact else 1)


@contextmanager
def rig_of(shards: int) -> Iterator[Rig]:
    """With Ray, an object store, a checkpoint and the shards, all of its own."""
    import ray

    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="vm", ignore_cleanup_errors=True)))
        conftest.start(str(folder / "r"))
        stack.callback(ray.shutdown)
        if ceph.missing_programs():
            url = stack.enter_context(s3_server())
        else:
            (folder / "c").mkdir()
            url = stack.enter_context(ceph.Ceph(folder / "c")).url
        proxy = stack.enter_context(S3Proxy(url))
        storage = {"s3": {"endpoint_url": proxy.url, "key": ceph.KEY, "secret": ceph.SECRET}}
        checkpoint = save_open_clip(folder / "clip")
        address = ray.get_runtime_context().gcs_address
        rig = Rig(folder, checkpoint, proxy, storage, address, shards, shards * SAMPLES_PER_SHARD)
        rig.fill()
        yield rig


def soak(rig: Rig, limit_s: float, seed: int) -> bool:
    chaos = Chaos(RATE, seed=seed)
    rig.proxy.chaos = chaos
    process = Command(rig.command("soak"))
    with Watch(process.pid, seed) as watch:
        status, printed = process.wait(limit_s)
    rig.proxy.chaos = None
    print_table(watch, chaos, printed)
    is_flat = max(watch.grown().values()) < GROWTH
    return status == 0 and is_flat and bool(watch.killed) and is_exact(rig)


def is_exact(rig: Rig) -> bool:
    store = rig.store("soak")
    assert_same(store, rig.store("reference"))
    collect(store)
    wrong = list(problems(store, deep=True))
    print(*wrong, sep="\n")
    print(f"exact: {len(rig.finished('soak'))} shards, every part, row and column as in a run without faults")
    return not wrong


def print_table(watch: Watch, chaos: Chaos, printed: str) -> None:
    print(printed)
    print(f"{'minute':>7} {'driver MiB':>11} {'largest worker MiB':>19} {'workers':>8}")
    for elapsed, driver, largest, count in watch.looks[:: max(1, len(watch.looks) // 20)]:
        print(f"{elapsed / 60:>7.1f} {driver:>11.0f} {largest:>19.0f} {count:>8}")
    for name, times in watch.grown().items():
        print(f"{name}: {times:.2f} times as much memory in the last third as in the middle (allowed: {GROWTH})")
    kills = {title: watch.killed.count(title) for title in TITLES}
    print(f"faults made: {dict(chaos.made)}; workers killed: {kills}")


if __name__ == "__main__":
    main()
