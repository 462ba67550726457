"""Ctrl-C, and SIGTERM as schedulers send it: a command ends in seconds, and what is committed stays."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM)
_received: list[int] = []


def received() -> int | None:
    """The first signal that there was. What fails after it fails because of it: Ray's processes may have had it too."""
    return _received[0] if _received else None


class Stopped(KeyboardInterrupt):
    """Raised in the main thread. Ray's calls, in which it may be waiting, end on this and on no other."""


@contextmanager
def stoppable() -> Iterator[None]:
    """A signal raises Stopped in the block; a second one does nothing."""
    _received.clear()
    with handlers_kept():
        if _is_main_thread():
            for number in SIGNALS:
                signal.signal(number, _stop)
        yield


@contextmanager
def handlers_kept() -> Iterator[None]:
    """Those of before the block stand after it, as where Ray sets its own when it starts."""
    before = {number: signal.getsignal(number) for number in SIGNALS}
    try:
        yield
    finally:
        if _is_main_thread():
            for number, handler in before.items():
                signal.signal(number, handler)


def _is_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()


def _stop(number: int, _: Any) -> None:
    # What is being cleared away should not be torn by a second one; it takes seconds.
    if not _received:
        _received.append(number)
        raise Stopped
