"""Ray, for the time of a command: the cluster that is named, or a local one that ends with it."""

from __future__ import annotations

import logging
import os
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache, partial
from typing import Any

from tenacity import (
    Retrying,
    retry_if_exception_message,
    retry_if_exception_type,
    stop_after_attempt,
    stop_after_delay,
    wait_fixed,
)

from jobs.signals import handlers_kept
from pipelines.errors import PreflightError
from pipelines.prepare import Cluster
from pipelines.secrets import masked

# One core may still read while the other encodes; Ray counts declared CPUs, not real ones.
LEAST_LOCAL_CPUS = 3
# A cluster that a script has just started may need a moment.
LISTENER_WAIT_S, CONNECT_TIMEOUT_S = 10, 5
# Ray gives its node 30 s to start, fixed in its code, which a busy machine may need twice.
STARTS = 3


@contextmanager
def connected(address: str | None) -> Iterator[Cluster]:
    """Connects to `address`, to RAY_ADDRESS, or starts Ray here; yields what it has to give.

    Raises: PreflightError where there is no cluster at the address.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    # Ray's core writes of harmless things straight to the terminal, past Python's logging.
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    import ray

    address = address or os.environ.get("RAY_ADDRESS")
    try:
        require_listener(address)
        with quiet_start(), handlers_kept(), own_process_group():
            _connect(address)
    except Exception as error:
        # Ray raises plain exceptions too, as when its node takes too long to start.
        raise PreflightError(
            f"Cannot connect to Ray at {address or 'this machine'}: {error}",
            "Check --address or RAY_ADDRESS; without either, Ray is started on this machine.",
        ) from None
    quiet_console()
    private_logs()
    try:
        yield resources(None if address else float(os.cpu_count() or 1))
    finally:
        ray.shutdown()


def require_listener(address: str | None) -> None:
    """Ray itself would try for 20 minutes. Raises: OSError where nothing listens at HOST:PORT."""
    host, colon, port = (address or "").rpartition("://")[2].rpartition(":")
    if colon and port.isdecimal():
        waited = Retrying(
            retry=retry_if_exception_type(OSError),
            stop=stop_after_delay(LISTENER_WAIT_S),
            wait=wait_fixed(1),
            reraise=True,
        )
        waited(socket.create_connection, (host.strip("[]"), int(port)), CONNECT_TIMEOUT_S).close()


def _connect(address: str | None) -> None:
    import ray

    if address:
        ray.init(address, log_to_driver=False, logging_level=logging.ERROR)
    else:
        Retrying(
            retry=retry_if_exception_message(match=".*timed out"),
            stop=stop_after_attempt(STARTS),
            before_sleep=lambda _: ray.shutdown(),
            reraise=True,
        )(_start)


def _start() -> None:
    import ray

    cpus = max(LEAST_LOCAL_CPUS, os.cpu_count() or 1)
    ray.init("local", num_cpus=cpus, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)


@contextmanager
def quiet_start() -> Iterator[None]:
    """Nothing on the terminal while Ray's core starts: it announces its own log level there."""
    sys.stderr.flush()
    terminal = os.dup(2)
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(terminal, 2)
        os.close(terminal)


@contextmanager
def own_process_group() -> Iterator[None]:
    """What Ray starts here meanwhile is not in ours: who signals a command's group means the command, which ends Ray.

    Had Ray's node the signal too, it could be gone first; and a driver whose node is gone ends at once, in C++, with
    exit code 1 and without a word. Elsewhere than on Linux it is by the group that Ray ends what it has started.
    """
    import ray._private.services

    services: Any = ray._private.services
    popen = services.ConsolePopen
    if sys.platform == "linux":
        services.ConsolePopen = partial(popen, process_group=0)
    try:
        yield
    finally:
        services.ConsolePopen = popen


def quiet_console() -> None:
    """Ray's own lines, tracebacks of tasks among them, go to its log files alone; ours say what a user needs."""
    import ray.data

    # Of its node's troubles it tells on stdout, among our results, and has no setting that stops it.
    ray._private.worker.print_to_stdstream = lambda data, ignore_prefix: None

    logging.getLogger(ray.__name__).setLevel(logging.ERROR)
    for handler in logging.getLogger(ray.data.__name__).handlers:
        if isinstance(handler, logging.StreamHandler):
            handler.setLevel(logging.CRITICAL)


@cache
def private_logs() -> None:
    """Ray logs what its workers raised, and all that led to it, in words that are not ours: credentials go from it."""
    make, form = logging.getLogRecordFactory(), logging.Formatter().formatException

    def make_private(*fields: Any, **more: Any) -> logging.LogRecord:
        record = make(*fields, **more)
        record.msg, record.args = masked(record.getMessage()), None
        if record.exc_info and record.exc_info[0]:
            record.exc_text = masked(form(record.exc_info))
        return record

    logging.setLogRecordFactory(make_private)


def resources(node_cpus: float | None) -> Cluster:
    """What the connected cluster has. node_cpus: real ones of a node, where Ray was told of more."""
    import ray

    alive: list[dict[str, Any]] = [node["Resources"] for node in ray.nodes() if node["Alive"]]  # type: ignore[no-untyped-call]
    cpus = [node["CPU"] for node in alive if node.get("CPU")]
    gpus = [node.get("GPU", 0.0) for node in alive]
    return Cluster(
        cpus=sum(cpus),
        gpus=sum(gpus),
        nodes=len(cpus) or 1,
        node_cpus=node_cpus or max(cpus, default=1.0),
        node_gpus=max(gpus, default=0.0),
        node_memory_mib=max((node.get("memory", 0.0) for node in alive), default=0.0) / 2**20,
    )
