"""What a process holds, as Linux counts it."""

from __future__ import annotations

import threading
from pathlib import Path


class PeakAnonymous:
    """MiB that this process held of its own at most, looked at every 0.2 s."""

    def __init__(self) -> None:
        self.mib = 0.0
        self._stop = threading.Event()
        threading.Thread(target=self._watch, daemon=True).start()

    def _watch(self) -> None:
        while not self._stop.wait(0.2):
            self.mib = max(self.mib, status_mib("RssAnon"))

    def stop(self) -> float:
        self._stop.set()
        return self.mib


def status_mib(name: str) -> float:
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines[name].split()[0]) / 2**10
