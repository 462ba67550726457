"""`vecmill` in processes of their own, each forked from one that has imported everything: seconds sooner than afresh."""

from __future__ import annotations

import multiprocessing
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from tempfile import NamedTemporaryFile

# Long enough for a run on a busy machine; a hang is found by the test's own time limit at the latest.
TIMEOUT_S = 1_200

_forks = multiprocessing.get_context("forkserver")
_forks.set_forkserver_preload(["jobs.cli", "pipelines.embed", "pipelines.index.build", "pipelines.encoders.open_clip"])


class Command:
    """A run that has been started, in this process's working folder and environment.

    alone: the leader of a process group of its own, as a terminal starts it, so that a signal reaches all that it
    starts.
    """

    def __init__(self, arguments: Sequence[str], alone: bool = False) -> None:
        with NamedTemporaryFile(suffix=".txt", delete=False) as file:
            self._printed = Path(file.name)
        self.arguments = arguments
        self._process = _forks.Process(
            target=_vecmill, args=(list(arguments), str(self._printed), str(Path.cwd()), dict(os.environ), alone)
        )
        self._process.start()
        assert self._process.pid is not None
        self.pid: int = self._process.pid

    @property
    def is_running(self) -> bool:
        return self._process.is_alive()

    def wait(self, timeout_s: float = TIMEOUT_S) -> tuple[int, str]:
        """Exit status, negative of the signal it died of, and all that it printed. Raises: TimeoutError."""
        self._process.join(timeout_s)
        status, printed = self._process.exitcode, self._printed.read_text()
        if status is None:
            self._process.kill()
            raise TimeoutError(f"vecmill {' '.join(self.arguments)} has not ended:\n{printed}")
        self._printed.unlink()
        return status, printed


def _vecmill(arguments: list[str], printed: str, folder: str, environment: dict[str, str], alone: bool) -> None:
    if alone:
        os.setsid()
    file = os.open(printed, os.O_WRONLY)
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    sys.argv = ["vecmill", *arguments]
    from jobs.cli import main

    main()


def vecmill(*arguments: str, status: int = 0) -> str:
    """What the command printed; it must end with `status`."""
    ended, printed = Command(arguments).wait()
    assert ended == status, f"vecmill {' '.join(arguments)} ended with {ended}:\n{printed}"
    return printed
