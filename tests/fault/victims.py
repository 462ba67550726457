"""Processes of this session's own Ray, to be killed."""

from __future__ import annotations

from contextlib import suppress

import psutil

TITLES = ("ray::ReadReadShards", "ray::MapBatches(Decode)", "ray::MapWorker(MapBatches(Encode)", "ray::Write")


def worker_of(title: str) -> psutil.Process | None:
    """One whose Ray title begins so, at work now."""
    return next((process for found, process in workers() if found == title), None)


def workers() -> list[tuple[str, psutil.Process]]:
    """All that are at work now, each with its title, which changes as soon as it has nothing to do."""
    found = []
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):
            shown = " ".join(process.cmdline())
            found += [(title, process) for title in TITLES if shown.startswith(title)]
    return found
