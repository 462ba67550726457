"""What goes wrong in Ray as what it means to a user: the stage, the shards, and what to do next."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import ray
from ray.data.context import DataContext
from ray.data.exceptions import ExecutionTimeoutError

from pipelines.errors import StalledError, VecmillError, WorkerError
from pipelines.ledger import Work

STAGES = {"ReadShards": "read", "(Decode)": "decode", "(Encode)": "encode", "Write": "write"}
ACTORS = {"(Encode)": "encode", "(Translate)": "translate"}
_OPERATOR = re.compile(r"^  - (?P<name>.+?): (?P<active>\d+) active task", re.MULTILINE)
Pending = Callable[[], list[Work]]


@contextmanager
def plain_errors(pending: Pending | None = None, no_progress_timeout_s: int | None = None) -> Iterator[None]:
    """Our own errors out of the layers that Ray wraps them in, and Ray's own as what they mean to a user.

    pending: what is not done yet, where that is known shard by shard. no_progress_timeout_s: the setting of this name,
    where the command has it; else Ray's own holds.
    """
    try:
        yield
    except Exception as error:
        causes = list(_causes(error))
        ours = next((cause for cause in causes if _is_ours(cause)), None)
        told = ours or next(
            (explained for cause in causes if (explained := _explained(cause, pending, no_progress_timeout_s))), None
        )
        if told is None or told is error:
            raise
        raise told from error


def _is_ours(error: BaseException) -> bool:
    """Ray's wrapping of an error of a task is one of its class too, but its message is a traceback."""
    return isinstance(error, VecmillError) and not isinstance(error, ray.exceptions.RayTaskError)


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """The error, and what is behind it; behind one of Ray Train's are those of its workers or its controller."""
    if error is not None:
        yield error
        yield from _causes(getattr(error, "cause", None) or error.__cause__)
        for worker in getattr(error, "worker_failures", {}).values():
            yield from _causes(worker)
        yield from _causes(getattr(error, "controller_failure", None))


def _explained(error: BaseException, pending: Pending | None, no_progress_timeout_s: int | None) -> VecmillError | None:
    if isinstance(error, ExecutionTimeoutError):
        return _stalled(str(error), pending, no_progress_timeout_s)
    if isinstance(error, ray.exceptions.ActorDiedError | ray.exceptions.ActorUnavailableError):
        stage = _actor(error)
        return WorkerError(
            f"{f'The {stage} actor' if stage else 'An actor'} cannot start or keeps dying: {_lines(error)[-1]}",
            "Most often its node has too little memory"
            + (f" for the model: lower {stage}.batch_size or {stage}.actors." if stage else "; Ray's logs tell more."),
        )
    if isinstance(
        error, ray.exceptions.WorkerCrashedError | ray.exceptions.OutOfMemoryError | ray.exceptions.NodeDiedError
    ):
        return WorkerError(
            f"A process of Ray's died and was not replaced: {_lines(error)[-1]}",
            "Run the same command again; should it die again, see whether its node has the memory that it needs.",
        )
    if isinstance(error, ray.exceptions.OutOfDiskError | ray.exceptions.ObjectStoreFullError):
        return WorkerError(
            f"Ray's object store is full, and so is the disk that it spills to: {_lines(error)[0]}",
            "Give Ray's temporary folder more room, or lower read.block_mib and read.rows_per_block.",
        )
    return None


def _stalled(told: str, pending: Pending | None, no_progress_timeout_s: int | None) -> StalledError:
    waited_s = no_progress_timeout_s or int(DataContext.get_current().execution_no_progress_timeout_s)
    left = f" {_left(pending)}" if pending else ""
    setting = "; cluster.no_progress_timeout_s sets how long to wait" if no_progress_timeout_s else ""
    return StalledError(
        f"Nothing has moved for {waited_s} s. {_at_work(told)}.{left}",
        f"See whether its storage and nodes answer, then run the same command again{setting}.",
    )


def _at_work(told: str) -> str:
    """The stages that have tasks which do not end, from Ray's account of the operators that are not done."""
    active = [(_stage(found["name"]), int(found["active"])) for found in _OPERATOR.finditer(told)]
    stalled = [f"{stage} ({count} tasks)" for stage, count in active if count]
    if stalled:
        return f"Stalled: {', '.join(stalled)}"
    first = active[0][0] if active else "The run"
    return f"{first} has no task at work: its processes do not start, keep dying, or find no room in the cluster"


def _stage(operator: str) -> str:
    return next((stage for word, stage in STAGES.items() if word in operator), operator)


def _actor(error: BaseException) -> str | None:
    """The stage that a dead actor was of, which has settings of the same name; None for any other actor."""
    return next((stage for word, stage in ACTORS.items() if word in str(error)), None)


def _left(pending: Pending) -> str:
    try:
        left = pending()
    except VecmillError as error:
        return f"What is done cannot be told: {error.what}"
    return f"{len(left)} shards are not done: {', '.join(work.shard.uri for work in left[:3])}"


def _lines(error: BaseException) -> list[str]:
    """Of what a task raised, without the task's traceback."""
    error = getattr(error, "cause", None) or error
    return [line.strip() for line in str(error).strip().splitlines()] or [type(error).__name__]
