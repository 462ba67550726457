"""Processes of this session's own Ray, to be killed."""

from __future__ import annotations

from contextlib import suppress

import psutil

TITLES = ("ray::ReadReadShards", "ray::MapBatches(Decode)", "ray::MapWorker(MapBatches(Encode)", "ray::Write")


def worker_of(title: str) -> psutil.Process | None:
    """One whose Ray title begins so, at work now."""
    return next(iter(workers((title,))), None)


def workers(titles: tuple[str, ...] = TITLES) -> list[psutil.Process]:
    found = []
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):
            if " ".join(process.cmdline()).startswith(titles):
                found.append(process)
    return found
