"""Ctrl-C, and SIGTERM as schedulers send it: a command ends in seconds, and what is committed stays."""

from __future__ import annotations

import signal
import threading
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM)
_received: list[int] = []


def received() -> int | None:
    """The first signal that there was. What fails after it fails because of it: Ray's processes may have had it too."""
    return _received[0] if _received else None


class Stopped(BaseException):
    """Raised in the main thread. No KeyboardInterrupt: the command-line library ends on that without a word."""


def raise_when_stopped() -> None:
    """Again after Ray has started: it sets handlers of its own."""
    if threading.current_thread() is threading.main_thread():
        for number in SIGNALS:
            signal.signal(number, _stop)


def _stop(number: int, _: Any) -> None:
    # What is being cleared away should not be torn by a second one; it takes seconds.
    for each in SIGNALS:
        signal.signal(each, signal.SIG_IGN)
    _received.append(number)
    raise Stopped
