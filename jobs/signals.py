"""Ctrl-C, and SIGTERM as schedulers send it: a command ends in seconds, and what is committed stays."""

from __future__ import annotations

import signal
import threading
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Stopped(BaseException):
    """Raised in the main thread. No KeyboardInterrupt: the command-line library ends on that without a word."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.exit_code = 128 + number


def raise_when_stopped() -> None:
    """Again after Ray has started: it sets handlers of its own."""
    if threading.current_thread() is threading.main_thread():
        for number in SIGNALS:
            signal.signal(number, _stop)


def _stop(number: int, _: Any) -> None:
    # What is being cleared away should not be torn by a second one; it takes seconds.
    for each in SIGNALS:
        signal.signal(each, signal.SIG_IGN)
    raise Stopped(number)
