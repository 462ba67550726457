"""Batches overlap, and running out of memory loses and reorders nothing: with stand-ins for the three stages."""

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pipelines.encoders.device import OnCpu, OnCuda
from pipelines.errors import EncoderError
from pipelines.overlap import FIRST_PATIENCE, BatchSize, overlapped

PATIENCE_S = 0.3


@dataclass
class Timeline:
    """When each stage of each batch started and ended, as places in one common order of events."""

    events: list[tuple[str, int, str]] = field(default_factory=list)
    changed: threading.Condition = field(default_factory=threading.Condition)

    def mark(self, stage: str, batch: int, edge: str) -> None:
        with self.changed:
            self.events.append((stage, batch, edge))
            self.changed.notify_all()

    def wait_for(self, stage: str, batch: int, at_most_s: float) -> None:
        with self.changed:
            self.changed.wait_for(lambda: (stage, batch, "start") in self.events, at_most_s)

    def span(self, stage: str, batch: int) -> tuple[int, int]:
        return self.events.index((stage, batch, "start")), self.events.index((stage, batch, "end"))


class Timed:
    """Stages that take as long as a device would: each is busy until the next one could have joined it.

    So a loop that overlaps is never told apart from one that does not by the speed of the machine.
    """

    threaded = True

    def __init__(self, batches: int, patience_s: float) -> None:
        self.timeline, self.batches, self.patience_s = Timeline(), batches, patience_s

    def _busy(self, stage: str, batch: int, until: tuple[str, int] | None) -> None:
        self.timeline.mark(stage, batch, "start")
        if until and until[1] < self.batches:
            self.timeline.wait_for(*until, self.patience_s)
        time.sleep(0.002)
        self.timeline.mark(stage, batch, "end")

    def copy(self, batch: Sequence[int]) -> int:
        self._busy("copy", batch[0], None)
        return batch[0]

    def compute(self, copied: int) -> int:
        self._busy("compute", copied, ("copy", copied + 1))
        return copied

    def collect(self, computed: int) -> list[int]:
        self._busy("collect", computed, ("compute", computed + 1))
        return [computed]

    def is_out_of_memory(self, error: BaseException) -> bool:
        return False

    def release(self) -> None:
        raise AssertionError("nothing ran out of memory")


def overlap_everywhere(timeline: Timeline, batches: int) -> bool:
    """The copy of n+1 began before the compute of n ended, and the collect of n ran beside the compute of n+1."""

    def beside(one: tuple[int, int], other: tuple[int, int]) -> bool:
        return one[0] < other[1] and other[0] < one[1]

    return all(
        beside(timeline.span("copy", n + 1), timeline.span("compute", n))
        and beside(timeline.span("collect", n), timeline.span("compute", n + 1))
        for n in range(batches - 1)
    )


def plain_loop(items: Sequence[int], _size: BatchSize, stages: Timed) -> list[int]:
    """What `for batch in batches: model(batch.to(device)).cpu()` does."""
    return [result for item in items for result in stages.collect(stages.compute(stages.copy([item])))]


def test_copy_compute_and_collect_of_neighbouring_batches_overlap() -> None:
    stages = Timed(batches=6, patience_s=30)
    assert overlapped(range(6), BatchSize(1), stages) == list(range(6))
    assert overlap_everywhere(stages.timeline, 6)


@pytest.mark.parametrize("loop", [plain_loop, overlapped], ids=["plain loop", "inline stages"])
def test_a_loop_that_does_one_thing_after_another_is_told_apart(loop: Callable[..., list[int]]) -> None:
    stages = Timed(batches=3, patience_s=PATIENCE_S)
    stages.threaded = False
    assert loop(range(3), BatchSize(1), stages) == list(range(3))
    assert not overlap_everywhere(stages.timeline, 3)


def test_no_more_than_three_batches_are_under_way() -> None:
    stages = Timed(batches=12, patience_s=30)
    overlapped(range(12), BatchSize(1), stages)
    under_way = peak = 0
    for stage, _, edge in stages.timeline.events:
        under_way += (stage, edge) == ("copy", "start")
        peak = max(peak, under_way)
        under_way -= (stage, edge) == ("collect", "end")
    assert 2 <= peak <= 3


class Device:
    """Stages that square numbers, and run out of memory when `full(stage, batch, call)` says so."""

    def __init__(self, full: Callable[[str, Sequence[int], int], bool], threaded: bool) -> None:
        self.full, self.threaded = full, threaded
        self.calls = self.raised = self.released = 0
        self.lock = threading.Lock()
        self.sizes: list[int] = []

    def _use(self, stage: str, batch: Sequence[int]) -> None:
        with self.lock:
            self.calls += 1
            if self.full(stage, batch, self.calls):
                self.raised += 1
                raise torch.cuda.OutOfMemoryError(f"{stage} of {len(batch)}")

    def copy(self, batch: Sequence[int]) -> list[int]:
        self._use("copy", batch)
        return list(batch)

    def compute(self, copied: list[int]) -> list[int]:
        self._use("compute", copied)
        self.sizes.append(len(copied))
        return copied

    def collect(self, computed: list[int]) -> list[int]:
        self._use("collect", computed)
        return [item * item for item in computed]

    def is_out_of_memory(self, error: BaseException) -> bool:
        return isinstance(error, torch.OutOfMemoryError)

    def release(self) -> None:
        self.released += 1


@given(
    count=st.integers(0, 60),
    limit=st.integers(1, 16),
    moments=st.sets(st.integers(1, 80), max_size=25),
    threaded=st.booleans(),
)
def test_out_of_memory_at_any_moment_loses_and_reorders_nothing(
    count: int, limit: int, moments: set[int], threaded: bool
) -> None:
    device = Device(lambda _stage, batch, call: call in moments and len(batch) > 1, threaded)
    size = BatchSize(limit)
    assert overlapped(range(count), size, device) == [item * item for item in range(count)]
    assert size.out_of_memory == device.raised
    assert device.released <= device.raised
    assert 1 <= size.now <= limit
    assert all(1 <= used <= limit for used in device.sizes)


@given(
    count=st.integers(1, 60),
    limit=st.integers(2, 64),
    room=st.integers(1, 64),
    stage=st.sampled_from(["copy", "compute", "collect"]),
    threaded=st.booleans(),
)
def test_a_device_with_little_room_is_used_at_the_size_that_fits(
    count: int, limit: int, room: int, stage: str, threaded: bool
) -> None:
    device = Device(lambda at, batch, _call: at == stage and len(batch) > room, threaded)
    size = BatchSize(limit)
    assert overlapped(range(count), size, device) == [item * item for item in range(count)]
    assert size.out_of_memory == device.raised
    assert (device.raised > 0) == (min(count, limit) > room)


def test_the_batch_grows_back_when_the_memory_is_there_again() -> None:
    device = Device(lambda stage, _batch, _call: stage == "compute" and not device.raised, threaded=False)
    size = BatchSize(8)
    overlapped(range(8 * 20), size, device)
    assert device.sizes[:FIRST_PATIENCE] == [4] * FIRST_PATIENCE
    assert device.sizes[FIRST_PATIENCE + 2] == 8
    assert (size.now, size.out_of_memory, device.released) == (8, 1, 1)


def test_a_size_that_never_fits_is_tried_ever_more_rarely() -> None:
    device = Device(lambda stage, batch, _call: stage == "compute" and len(batch) > 4, threaded=False)
    size = BatchSize(8)
    overlapped(range(4 * 1000), size, device)
    assert 2 < size.out_of_memory < 12


def test_an_item_too_big_alone_is_named() -> None:
    device = Device(lambda stage, batch, _call: stage == "compute" and 5 in batch, threaded=True)
    with pytest.raises(EncoderError, match=r"the image of row 5[^0-9](.|\n)*encode\."):
        overlapped(range(9), BatchSize(4), device, "the image of row {}".format)


def test_one_item_that_fits_only_alone_is_no_error() -> None:
    """The next batch's copy takes the memory that the item needs."""
    copied: set[int] = set()

    def full(stage: str, batch: Sequence[int], _call: int) -> bool:
        if stage == "copy":
            copied.add(batch[0])
        return stage == "compute" and batch[0] == 2 and 3 in copied and not copied.discard(3)

    device = Device(full, threaded=False)
    assert overlapped(range(6), BatchSize(1), device) == [item * item for item in range(6)]
    assert device.raised == 1


@pytest.mark.parametrize("threaded", [True, False])
@pytest.mark.parametrize("stage", ["copy", "compute", "collect"])
def test_another_error_is_raised_as_it_is(stage: str, threaded: bool) -> None:
    device = Device(lambda *_: False, threaded)

    def broken(_batch: Sequence[int]) -> list[int]:
        raise KeyError("weights")

    setattr(device, stage, broken)
    with pytest.raises(KeyError, match="weights"):
        overlapped(range(9), BatchSize(2), device)


def test_the_failed_batch_is_let_go_before_the_next_is_tried() -> None:
    """The traceback of an error holds the tensors of its frames; held on to, halving frees nothing."""
    held: list[object] = []

    class Tensor:
        def __init__(self, batch: Sequence[int]) -> None:
            self.batch = batch
            held.append(self)

        def __del__(self) -> None:
            alive.discard(id(self))

    alive: set[int] = set()
    device = Device(lambda *_: False, threaded=True)

    def compute(batch: list[int]) -> list[int]:
        tensor = Tensor(batch)
        held.clear()
        alive.add(id(tensor))
        if len(batch) > 2:
            raise torch.OutOfMemoryError
        return batch

    def release() -> None:
        assert not alive

    device.compute, device.release = compute, release  # type: ignore[method-assign]
    assert overlapped(range(20), BatchSize(8), device) == [item * item for item in range(20)]


def test_calls_in_two_threads_share_one_size() -> None:
    device = Device(lambda stage, batch, _call: stage == "compute" and len(batch) > 3, threaded=True)
    size, results = BatchSize(16), {}
    run = partial(overlapped, size=size, stages=device)
    threads = [
        threading.Thread(target=lambda at=at: results.update({at: run(range(at, at + 100))})) for at in (0, 1000)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == {at: [item * item for item in range(at, at + 100)] for at in (0, 1000)}
    assert size.out_of_memory == device.raised


def test_only_a_gpu_needs_threads_to_overlap() -> None:
    assert OnCuda.threaded and not OnCpu.threaded
