"""Stage clocks, the run's meter, and what is made of them: progress lines, bottleneck, report."""

from __future__ import annotations

import resource
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

Observe = Callable[..., None]
"""observe(stage="decode", rows=128, seconds=0.4): adds numbers to a stage. `peak_…` keeps the maximum."""

Stages = dict[str, dict[str, float]]

MOST_POINTS = 200


def nowhere(**_: Any) -> None:
    """An Observe that keeps nothing."""


class Meter:
    """Adds up what the stages observe."""

    def __init__(self) -> None:
        self._stages: Stages = defaultdict(dict)

    def add(self, stage: str, **numbers: float) -> None:
        totals = self._stages[stage]
        for name, value in numbers.items():
            before = totals.get(name, 0.0)
            totals[name] = max(before, value) if name.startswith("peak_") else before + value

    def snapshot(self) -> Stages:
        return {stage: dict(numbers) for stage, numbers in self._stages.items()}


class Pace:
    """How many rows each stage had done by when: MOST_POINTS at most, whose neighbours merge as a run goes on."""

    def __init__(self) -> None:
        self._points: list[dict[str, Any]] = []
        self._apart_s = 0.0

    def add(self, at_s: float, stages: Stages) -> None:
        """at_s: since the run began, later than of the last."""
        rows = {stage: numbers["rows"] for stage, numbers in stages.items() if "rows" in numbers}
        before = self._points[-2]["seconds"] if len(self._points) > 1 else 0.0
        if self._points and self._points[-1]["seconds"] < before + self._apart_s:
            self._points.pop()
        self._points.append({"seconds": round(at_s, 1), "rows": rows})
        if len(self._points) > MOST_POINTS:
            # Sums up to then: without every other point, an interval has what its two halves had.
            self._points = self._points[::2]
            self._apart_s = 2 * self._points[-1]["seconds"] / MOST_POINTS

    @property
    def points(self) -> list[dict[str, Any]]:
        """`{"seconds": 12.0, "rows": {"read": 512, "write": 384}}`, in order."""
        return list(self._points)


class Clock:
    """Seconds spent inside `with clock:`, so that a generator can leave out its consumer's time."""

    def __init__(self) -> None:
        self.seconds = 0.0

    @contextmanager
    def running(self) -> Iterator[None]:
        started = time.perf_counter()
        try:
            yield
        finally:
            self.seconds += time.perf_counter() - started


class SharedClock:
    """Seconds in which at least one of several threads was inside `with clock.running():`."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._inside, self._since, self._untold = 0, 0.0, 0.0

    @contextmanager
    def running(self) -> Iterator[None]:
        self._pass(1)
        try:
            yield
        finally:
            self._pass(-1)

    def _pass(self, step: int) -> None:
        with self._lock:
            now = time.perf_counter()
            if self._inside:
                self._untold += now - self._since
            self._inside, self._since = self._inside + step, now

    def take(self) -> float:
        """Seconds since it was last asked, up to when a thread last went in or out."""
        with self._lock:
            seconds, self._untold = self._untold, 0.0
        return seconds


def peak_memory_mib() -> float:
    """The most memory this process has had to itself: the object store's pages, which it only maps, are left out.

    Where the system does not tell them apart (macOS), they are in it.
    """
    try:
        status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        kib = [int(status[name].split()[0]) for name in ("VmHWM", "RssShmem")]
    except (OSError, KeyError):
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak / 2**20 if sys.platform == "darwin" else peak / 2**10
    return (kib[0] - kib[1]) / 2**10


def bottleneck(stages: Stages, workers: dict[str, float]) -> str | None:
    """The stage with the most seconds a worker, which is the one that sets the pace.

    workers: how many of each stage can run at once; 1 where not named.
    """
    loads = {
        stage: numbers["seconds"] / max(workers.get(stage, 1.0), 1e-9)
        for stage, numbers in stages.items()
        if numbers.get("seconds")
    }
    return max(loads, key=lambda stage: loads[stage]) if loads else None


def duration(seconds: float) -> str:
    """`3 h 05 min`, `4 min 10 s` or `12 s`."""
    whole = round(seconds)
    if whole >= 3600:
        return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
    return f"{whole // 60} min {whole % 60:02d} s" if whole >= 60 else f"{whole} s"
