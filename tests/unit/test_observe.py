"""Sums and peaks of the stages, the stage that sets the pace, and times as people say them."""

from __future__ import annotations

import time

import numpy as np
import pytest

from pipelines.observe import (
    MOST_POINTS,
    Clock,
    Meter,
    Pace,
    SharedClock,
    bottleneck,
    duration,
    nowhere,
    peak_memory_mib,
)


def test_a_meter_adds_up_and_keeps_the_peaks() -> None:
    meter = Meter()
    meter.add("decode", rows=3, seconds=0.5, peak_mib=100.0)
    meter.add("decode", rows=4, seconds=0.25, peak_mib=80.0)
    meter.add("encode", rows=7)
    assert meter.snapshot() == {
        "decode": {"rows": 7, "seconds": 0.75, "peak_mib": 100.0},
        "encode": {"rows": 7},
    }


def test_a_reading_does_not_change_afterwards() -> None:
    meter = Meter()
    meter.add("decode", rows=1)
    reading = meter.snapshot()
    meter.add("decode", rows=1)
    assert reading == {"decode": {"rows": 1}}


@pytest.mark.parametrize("readings", [1, 7, MOST_POINTS, MOST_POINTS + 1, 5_000])
def test_a_pace_has_few_points_evenly_apart_and_the_last(readings: int) -> None:
    pace = Pace()
    for at in range(1, readings + 1):
        pace.add(at / 4, {"read": {"rows": 8.0 * at, "seconds": 1.0}, "write": {"seconds": 1.0}})
    points = pace.points
    assert min(readings, MOST_POINTS // 2) <= len(points) <= MOST_POINTS
    assert points[-1] == {"seconds": pytest.approx(readings / 4, abs=0.06), "rows": {"read": 8.0 * readings}}
    for point in points:
        assert point["rows"]["read"] == pytest.approx(32 * point["seconds"], abs=2)
    # The last interval may be cut short.
    apart = np.diff([point["seconds"] for point in points])[:-1]
    assert not len(apart) or apart.max() <= 2 * apart.min() + 0.3


def test_a_clock_leaves_out_what_is_outside_and_counts_what_fails() -> None:
    clock = Clock()
    with clock.running():
        time.sleep(0.02)
    first = clock.seconds
    time.sleep(0.02)
    assert clock.seconds == first >= 0.02
    with pytest.raises(ValueError), clock.running():
        time.sleep(0.02)
        raise ValueError
    assert clock.seconds >= first + 0.02


def test_peak_memory_is_of_this_process_in_mib() -> None:
    before = peak_memory_mib()
    held = np.ones(64 * 2**20, np.uint8)
    assert before > 10 and peak_memory_mib() >= before
    assert peak_memory_mib() < 2**20, f"{held.nbytes} bytes made it that many MiB"


@pytest.mark.parametrize(
    ("seconds", "workers", "slowest"),
    [
        ({"decode": 10.0, "encode": 9.0}, {}, "decode"),
        ({"decode": 10.0, "encode": 9.0}, {"decode": 2.0}, "encode"),
        ({"decode": 10.0, "encode": 9.0}, {"decode": 2.0, "encode": 4.0}, "decode"),
        ({"decode": 0.0}, {}, None),
        ({}, {}, None),
    ],
)
def test_the_bottleneck_has_the_most_seconds_a_worker(
    seconds: dict[str, float], workers: dict[str, float], slowest: str | None
) -> None:
    stages = {stage: {"seconds": spent, "rows": 1.0} for stage, spent in seconds.items()}
    assert bottleneck({**stages, "untimed": {"rows": 5.0}}, workers) == slowest


@pytest.mark.parametrize(
    ("seconds", "said"),
    [
        (0, "0 s"),
        (11.6, "12 s"),
        (59.7, "1 min 00 s"),
        (250, "4 min 10 s"),
        (3599.6, "1 h 00 min"),
        (11_100, "3 h 05 min"),
        (360_000, "100 h 00 min"),
    ],
)
def test_a_duration_reads_well(seconds: float, said: str) -> None:
    assert duration(seconds) == said


def test_observing_nowhere_takes_anything() -> None:
    nowhere(stage="read", rows=1)


def test_a_shared_clock_counts_the_time_of_two_at_once_once(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("pipelines.observe.time.perf_counter", lambda: now[0])
    clock = SharedClock()
    one, two = clock.running(), clock.running()
    for at, step in ((0, one.__enter__), (1, two.__enter__), (4, lambda: one.__exit__(None, None, None))):
        now[0] = at
        step()
    assert clock.take() == 4
    now[0] = 6
    two.__exit__(None, None, None)
    now[0] = 9
    assert clock.take() == 2 and clock.take() == 0
