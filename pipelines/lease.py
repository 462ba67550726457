"""Who is at work on an output: a lease that its holder renews, and that the next takes over when it does not.

A lease is a file `leases/<name>/<epoch>.json`, created only if absent, so that of several takers one wins. The
ledger is right without it: a lease saves two runs from doing the same work, and lets `collect` know that what
lies in staging is nobody's.
"""

from __future__ import annotations

import _thread
import os
import random
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from datetime import UTC, datetime
from functools import cache
from pathlib import Path

import psutil
from pydantic import BaseModel

from pipelines.errors import HeldError, VecmillError
from pipelines.storage import Store, is_whole_json

FOLDER = "leases"
COLLECT = "collect"
RENEW_S = 5.0
LIMIT_S = 60.0
"""A lease that its holder has not renewed for so long is taken over: longer than one request may take."""
PATIENCE_S = 3.0
BETWEEN_LOOKS_S = (0.05, 0.2)

Say = Callable[[str], None]
_silent: set[str] = set()
"""Roots of stores that said nothing for PATIENCE_S when a lease in them was to end."""


class Holder(BaseModel):
    """Who holds a lease. machine, pid, started: so that a holder that died here is known at once; renewed: how
    often, since clocks of two machines tell nothing."""

    token: str
    verb: str
    host: str
    machine: str
    pid: int
    started: str
    since: str
    renewed: int = 0

    def __str__(self) -> str:
        return f"{self.verb} on {self.host}, process {self.pid}, since {self.since}"


def this_process(verb: str) -> Holder:
    return Holder(
        token=uuid.uuid4().hex,
        verb=verb,
        host=socket.gethostname(),
        machine=machine(),
        pid=os.getpid(),
        started=start_of(os.getpid()),
        since=f"{datetime.now(UTC):%Y-%m-%d %H:%M:%S} UTC",
    )


@cache
def machine() -> str:
    """Where a process number means the same process: this boot, in this container."""
    parts = [socket.gethostname()]
    with suppress(OSError):
        parts += [
            Path("/proc/sys/kernel/random/boot_id").read_text().strip(),
            str(Path("/proc/self/ns/pid").readlink()),
        ]
    return " ".join(parts)


def start_of(pid: int) -> str:
    """When a process started, in the kernel's own count where it tells it: the wall clock may be set meanwhile.

    Raises: OSError or psutil.Error where there is no such process.
    """
    stat = Path(f"/proc/{pid}/stat")
    if stat.parent.parent.exists():
        return stat.read_text().rpartition(")")[2].split()[19]
    return str(round(psutil.Process(pid).create_time()))


@contextmanager
def held(
    store: Store,
    name: str,
    verb: str,
    excludes: Callable[[str], bool] = lambda other: other == COLLECT,
    say: Say = lambda line: None,
    renew_s: float = RENEW_S,
    limit_s: float = LIMIT_S,
) -> Iterator[None]:
    """Holds the lease `name` while the block runs; in the main thread, ends the block where it is taken over.

    excludes: other leases that may not be held at the same time. say: told while another's life is in doubt.
    Raises: HeldError where another process holds it, or has taken it over.
    """
    lease = _Lease(store, name, this_process(verb), limit_s, say)
    lease.take()
    try:
        with lease.renewed_every(renew_s):
            # Taken first, looked for others second: of two that exclude each other, at least one sees the other.
            for other in _names(store):
                if other != name and excludes(other):
                    _Lease(store, other, lease.holder, limit_s, say).require_free()
            yield
    except BaseException:
        if not lease.lost:
            raise
        raise HeldError(
            f"{store.root} was taken over by another run: this one did not renew its lease for {limit_s:.0f} s",
            "What it committed stays, and the other goes on from there.",
        ) from None
    finally:
        lease.drop()


@contextmanager
def in_turn(store: Store, name: str, verb: str, patience_s: float = 2 * LIMIT_S) -> Iterator[None]:
    """As `held`, for work of a moment: waits for whoever has the lease, and is in nobody else's way.

    Raises: HeldError where it does not come free within `patience_s`.
    """
    deadline = time.monotonic() + patience_s
    with ExitStack() as turn:
        while True:
            try:
                turn.enter_context(held(store, name, verb, excludes=lambda other: False))
                break
            except HeldError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(random.uniform(*BETWEEN_LOOKS_S))
        yield


class _Lease:
    def __init__(self, store: Store, name: str, holder: Holder, limit_s: float, say: Say) -> None:
        self._store, self._folder, self.holder = store, f"{FOLDER}/{name}", holder
        self._limit_s, self._say = limit_s, say
        self._epoch = 0
        self.lost = False

    def take(self) -> None:
        """The next epoch, once the one before is known to be over."""
        while True:
            epochs = self._epochs()
            over = self._require_over(epochs)
            self._epoch = max(epochs, default=0) + 1
            if self._store.put_if_absent(self._path(self._epoch), self._bytes()) or self._is_ours():
                if self._is_alone(over):
                    self._store.delete(self._path(epoch) for epoch in epochs)
                    return
                self._store.delete([self._path(self._epoch)])
                time.sleep(random.uniform(*BETWEEN_LOOKS_S))

    def _is_alone(self, over: Holder | None) -> bool:
        """Another may have taken an epoch that this one saw go: of two at once, at least one sees the other."""
        rival = self._standing([epoch for epoch in self._epochs() if epoch != self._epoch])
        return rival is None or (over is not None and rival.token == over.token)

    def require_free(self) -> None:
        """Removes the lease of a dead process, which ends that one should it only have slept.

        Raises: HeldError where one that lives holds it.
        """
        epochs = self._epochs()
        self._require_over(epochs)
        self._store.delete(self._path(epoch) for epoch in epochs)

    def _require_over(self, epochs: list[int]) -> Holder | None:
        """Returns whose lease is over, where there was one. Raises: HeldError where it is not."""
        standing = self._standing(epochs)
        if standing and self._lives(standing):
            raise HeldError(
                f"{self._store.root} is held by another run: {standing}",
                f"Wait for it or stop it. Should it be dead, its lease ends {self._limit_s:.0f} s after its last sign.",
            )
        return standing

    def _lives(self, standing: Holder) -> bool:
        """Here its process is looked up; elsewhere it is given the time to renew its lease."""
        if standing.machine == machine():
            return _goes_on(standing)
        self._say(f"{self._store.root} is held by {standing}; up to {self._limit_s:.0f} s to see whether it lives")
        deadline = time.monotonic() + self._limit_s
        while time.monotonic() < deadline:
            time.sleep(min(1.0, self._limit_s / 10))
            now = self._standing(self._epochs())
            if now is None:
                return False
            if now != standing:
                return True
        return False

    @contextmanager
    def renewed_every(self, renew_s: float) -> Iterator[None]:
        over = threading.Event()
        thread = threading.Thread(target=self._renew_until, args=(over, renew_s), daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            self._await(thread)

    def _renew_until(self, over: threading.Event, renew_s: float) -> None:
        while not over.wait(renew_s):
            # A store that is away for a while: the run itself finds out.
            with suppress(OSError, VecmillError):
                self._renew()
            if self.lost and not over.is_set():
                _thread.interrupt_main()
                return

    def _renew(self) -> None:
        """Lost where another's stands in its place, or none: whoever judged this process dead has removed it."""
        if max(self._epochs(), default=0) != self._epoch or not self._is_ours():
            self.lost = True
            return
        self.holder.renewed += 1
        self._store.put_atomic(self._path(self._epoch), self._bytes())

    def drop(self) -> None:
        """A store that does not answer now leaves the lease to its limit; whoever stops a run is not kept waiting."""
        thread = threading.Thread(target=self._drop, daemon=True)
        thread.start()
        self._await(thread)

    def _await(self, thread: threading.Thread) -> None:
        """Not for long, and not again where it was too long once: a run may hold several leases in one store."""
        thread.join(0 if self._store.root in _silent else PATIENCE_S)
        if thread.is_alive():
            _silent.add(self._store.root)

    def _drop(self) -> None:
        with suppress(OSError, VecmillError):
            if self._is_ours():
                self._store.delete([self._path(self._epoch)])

    def _standing(self, epochs: list[int]) -> Holder | None:
        """Of the highest epoch. One that is not to be read, as of a later version of this program, is no holder."""
        for epoch in sorted(epochs, reverse=True):
            with suppress(FileNotFoundError, ValueError):
                return Holder.model_validate_json(self._store.read(self._path(epoch), is_whole_json))
        return None

    def _is_ours(self) -> bool:
        with suppress(FileNotFoundError, ValueError):
            there = Holder.model_validate_json(self._store.read(self._path(self._epoch), is_whole_json, listed=True))
            return there.token == self.holder.token
        return False

    def _epochs(self) -> list[int]:
        names = (name.removesuffix(".json") for name in self._store.names(self._folder))
        return [int(name) for name in names if name.isdigit()]

    def _path(self, epoch: int) -> str:
        return f"{self._folder}/{epoch}.json"

    def _bytes(self) -> bytes:
        return self.holder.model_dump_json().encode()


def _names(store: Store) -> set[str]:
    """Of all leases that stand, perhaps of dead holders."""
    return {name.rpartition("/")[0] for name in store.names(FOLDER)}


def _goes_on(holder: Holder) -> bool:
    """One that was just killed may take a moment to be gone."""
    for _ in range(5):
        if not _is_running(holder):
            return False
        time.sleep(0.1)
    return True


def _is_running(holder: Holder) -> bool:
    """A number may have gone to another process since; the time it started tells them apart."""
    with suppress(OSError, psutil.Error):
        is_the_same = start_of(holder.pid) == holder.started
        return bool(is_the_same and psutil.Process(holder.pid).status() != psutil.STATUS_ZOMBIE)
    return False
