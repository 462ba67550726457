"""The run's meter: an actor on the driver's node that adds up what all workers observe.

Apart from `embed.py`, because a worker that unpickles a RemoteObserve imports its module, and torch with that one.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from pipelines.observe import Meter, Stages

OnProgress = Callable[[Stages], None]


def start_meter() -> Any:
    """On the driver's own node: it must not be lost with a worker's, which the run survives."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
    meter: Any = ray.remote(num_cpus=0)(Meter)
    return meter.options(scheduling_strategy=here).remote()


class RemoteObserve:
    """An Observe that any worker can call; numbers on their way to a meter that died are lost, no more."""

    def __init__(self, meter: Any) -> None:
        self._meter = meter

    def __call__(self, **numbers: Any) -> None:
        with suppress(ray.exceptions.RayError):
            self._meter.add.remote(**numbers)


def reading(meter: Any) -> Stages:
    """What it has added up; nothing where it died, which must not fail a run that did not."""
    with suppress(ray.exceptions.RayError):
        return dict(ray.get(meter.snapshot.remote(), timeout=30))
    return {}


@contextmanager
def reporting(meter: Any, on_progress: OnProgress, interval_s: float) -> Iterator[None]:
    """Calls on_progress with the meter's reading every interval_s while the block runs, and once after."""
    stop = threading.Event()

    def report() -> None:
        on_progress(reading(meter))

    def loop() -> None:
        while not stop.wait(interval_s):
            report()

    thread = threading.Thread(target=loop, daemon=True)
    thread.start()
    try:
        yield
    except BaseException:
        # Whoever stops a run, or learns that it failed, is not kept waiting for numbers.
        stop.set()
        raise
    stop.set()
    thread.join()
    report()
