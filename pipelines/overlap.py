"""Items through copy, compute and collect in micro-batches, overlapped, surviving out-of-memory.

While batch n computes, batch n+1 is copied to the device and the vectors of n-1 are collected from
it. Running out of memory in any of the three halves the batch and runs the same items again.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor, wait
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, Generic, Protocol, TypeVar

from pipelines.errors import EncoderError

Item = TypeVar("Item")
Item_in = TypeVar("Item_in", contravariant=True)
Result = TypeVar("Result")
Result_out = TypeVar("Result_out", covariant=True)

FIRST_PATIENCE = 4
LONGEST_PATIENCE = 1024


class Stages(Protocol[Item_in, Result_out]):
    """What is done to one batch. threaded: copy and collect run in threads of their own."""

    threaded: bool

    def copy(self, batch: Sequence[Item_in]) -> Any:
        """The batch on the device."""
        ...

    def compute(self, copied: Any) -> Any:
        """Always called in the thread that called `overlapped`."""
        ...

    def collect(self, computed: Any) -> Sequence[Result_out]:
        """One result an item, on the host."""
        ...

    def is_out_of_memory(self, error: BaseException) -> bool: ...

    def release(self) -> None:
        """Gives unused device memory back, before a smaller batch is tried."""
        ...


@dataclass
class BatchSize:
    """Items in one batch: halved when memory runs out, doubled back up to `limit` after good batches.

    Shared by calls in several threads.

    patience: good batches before it grows; doubled each time it had grown and then did not fit, so
        that a size that never fits is tried ever more rarely.
    out_of_memory: times memory ran out so far.
    """

    limit: int
    now: int = 0
    out_of_memory: int = 0
    patience: int = FIRST_PATIENCE
    good: int = 0
    grown: bool = False
    lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def __post_init__(self) -> None:
        self.now = self.now or self.limit

    def shrink(self, failed: int, times: int) -> None:
        """failed: items in the batch that did not fit. times: how often memory ran out, its prefetch's
        included."""
        with self.lock:
            self.out_of_memory += times
            if self.grown:
                self.patience = min(2 * self.patience, LONGEST_PATIENCE)
            self.now, self.good, self.grown = max(1, min(self.now, failed // 2)), 0, False

    def succeed(self) -> None:
        with self.lock:
            self.good += 1
            if self.good >= self.patience and self.now < self.limit:
                self.now, self.good, self.grown = min(2 * self.now, self.limit), 0, True


def overlapped(
    items: Sequence[Item],
    size: BatchSize,
    stages: Stages[Item, Result],
    name: Callable[[int], str] = "item {}".format,
) -> list[Result]:
    """One result an item, in the items' order.

    name: what to call the item at a position, should it not fit alone.
    Raises: EncoderError naming an item for which there is not enough memory even alone.
    """
    with ExitStack() as stack:
        copier, collector = (stack.enter_context(_executor(stages.threaded)) for _ in range(2))
        flight = _Flight(items, size, stages, copier, collector)
        while len(flight.results) < len(items):
            if not flight.advance():
                flight.land()
                stages.release()
            if flight.too_big is not None:
                raise EncoderError(
                    f"There is not enough memory to encode {name(flight.too_big)}, even alone",
                    "Give each actor more memory or a whole device (encode.gpus_per_actor), or set a lower precision.",
                )
        return flight.results


class _Flight(Generic[Item, Result]):
    """Batches under way: at most one copied ahead, one computing, one being collected."""

    def __init__(
        self,
        items: Sequence[Item],
        size: BatchSize,
        stages: Stages[Item, Result],
        copier: Executor,
        collector: Executor,
    ) -> None:
        self.items, self.size, self.stages = items, size, stages
        self.copier, self.collector = copier, collector
        self.results: list[Result] = []
        self.too_big: int | None = None
        self.copying: deque[tuple[range, Future[Any]]] = deque()
        self.collecting: deque[tuple[range, Future[Sequence[Result]]]] = deque()
        self.batch = range(0)
        self.sent = 0
        # After running out of memory a batch has the device to itself, so that what failed is its own size.
        self.alone = False

    def advance(self) -> bool:
        """One batch further; False where memory ran out, and `land` must follow.

        The error is gone when this returns: its traceback would keep the failed batch's tensors.
        """
        try:
            self._compute_next()
            while len(self.collecting) > (1 if self._is_more() and not self.alone else 0):
                self._collect_oldest()
        except Exception as error:
            if not self.stages.is_out_of_memory(error):
                raise
            return False
        return True

    def land(self) -> None:
        """Keeps what is collected in order, drops the rest, and makes the next batch a smaller one."""
        nothing_else = not self.copying and not self.collecting
        if nothing_else and len(self.batch) == 1:
            self.too_big = self.batch.start
        self.size.shrink(len(self.batch), 1 + self._drop())
        self.sent = len(self.results)
        self.alone = True

    def _drop(self) -> int:
        """How many of the dropped ran out of memory too."""
        wait([future for _, future in (*self.copying, *self.collecting)])
        for batch, future in self.collecting:
            if batch.start == len(self.results) and not future.exception():
                self.results.extend(future.result())
        errors = [future.exception() for _, future in (*self.copying, *self.collecting)]
        self.copying.clear()
        self.collecting.clear()
        return sum(error is not None and self.stages.is_out_of_memory(error) for error in errors)

    def _compute_next(self) -> None:
        if not self.copying and self._is_more():
            self._copy_next()
        if not self.copying:
            return
        self.batch, copied = self.copying.popleft()
        on_device = copied.result()
        if not self.alone and self._is_more():
            self._copy_next()
        computed = self.stages.compute(on_device)
        self.collecting.append((self.batch, self.collector.submit(self.stages.collect, computed)))

    def _copy_next(self) -> None:
        batch = range(self.sent, min(self.sent + self.size.now, len(self.items)))
        self.sent = batch.stop
        self.copying.append((batch, self.copier.submit(self.stages.copy, self.items[batch.start : batch.stop])))

    def _collect_oldest(self) -> None:
        self.batch, collected = self.collecting.popleft()
        self.results.extend(collected.result())
        self.size.succeed()
        self.alone = False

    def _is_more(self) -> bool:
        return bool(self.copying) or self.sent < len(self.items)


def _executor(threaded: bool) -> Executor:
    return ThreadPoolExecutor(1) if threaded else _Inline()


class _Inline(Executor):
    """Runs a call where it is submitted: on a CPU a thread more only takes cores from the model."""

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()
        try:
            future.set_result(fn(*args, **kwargs))
        except Exception as error:
            future.set_exception(error)
        return future
