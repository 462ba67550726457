"""One holder at a time, and none for ever: a holder that dies, or is silent, is followed by the next."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest

from pipelines.errors import HeldError
from pipelines.lease import COLLECT, Holder, held, this_process
from pipelines.storage import Store

NAME, PATH = "embed/clip", "leases/embed/clip"
HOLD = f"""
import sys, time
from pipelines.lease import held
from pipelines.storage import Store
with held(Store(sys.argv[1]), {NAME!r}, "embed"):
    print("held", flush=True)
    time.sleep(600)
"""


@pytest.fixture(params=["local", "s3"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    if request.param == "local":
        return Store(str(tmp_path))
    return Store(f"s3://bucket/{uuid4().hex}", {"s3": request.getfixturevalue("s3_options")})


@contextmanager
def another_process(folder: Path) -> Iterator[subprocess.Popen[str]]:
    """That holds the lease."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(folder)], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout and process.stdout.readline() == "held\n"
        yield process
    finally:
        process.kill()
        process.wait()


def stranger(**more: Any) -> Holder:
    """A holder on another machine."""
    return this_process("embed").model_copy(update={"machine": "elsewhere", "host": "elsewhere", **more})


def put(store: Store, holder: Holder, epoch: int = 1) -> None:
    store.put_atomic(f"{PATH}/{epoch}.json", holder.model_dump_json().encode())


def test_a_lease_is_gone_with_its_block(store: Store) -> None:
    with held(store, NAME, "embed"):
        assert store.names("leases") == ["embed/clip/1.json"]
    assert store.names("leases") == []


def test_a_second_one_is_told_who_holds_it(tmp_path: Path) -> None:
    with (
        another_process(tmp_path) as process,
        pytest.raises(HeldError, match=f"embed on .*process {process.pid}"),
        held(Store(str(tmp_path)), NAME, "embed"),
    ):
        raise AssertionError("held by two")
    assert HeldError.exit_code == 4


def test_that_of_a_process_that_was_killed_here_is_taken_at_once(tmp_path: Path) -> None:
    doubts: list[str] = []
    with another_process(tmp_path) as process:
        process.send_signal(signal.SIGKILL)
        with held(Store(str(tmp_path)), NAME, "embed", say=doubts.append):
            assert Store(str(tmp_path)).names(PATH) == ["2.json"]
    assert not doubts


def test_a_process_number_that_another_has_now_is_no_holder(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    put(store, this_process("embed").model_copy(update={"started": "1"}))
    with held(store, NAME, "embed"):
        assert store.names(PATH) == ["2.json"]


def test_a_silent_holder_elsewhere_is_followed_after_the_limit(store: Store) -> None:
    put(store, stranger())
    doubts: list[str] = []
    with held(store, NAME, "embed", say=doubts.append, limit_s=1):
        assert store.names(PATH) == ["2.json"]
    assert len(doubts) == 1 and "elsewhere" in doubts[0]


def test_one_that_renews_elsewhere_is_not(store: Store) -> None:
    put(store, stranger())
    over = threading.Event()

    def renew() -> None:
        renewed = 0
        while not over.wait(0.1):
            renewed += 1
            put(store, stranger(renewed=renewed))

    with ThreadPoolExecutor(1) as pool:
        pool.submit(renew)
        try:
            with pytest.raises(HeldError, match="elsewhere"), held(store, NAME, "embed", limit_s=20):
                raise AssertionError("held by two")
        finally:
            over.set()


def test_a_holder_that_was_followed_is_ended(store: Store) -> None:
    """As one whose machine slept: it must not go on beside the one that took over."""
    with pytest.raises(HeldError, match="taken over"), held(store, NAME, "embed", renew_s=0.1):
        put(store, stranger(), epoch=2)
        for _ in range(600):
            time.sleep(0.1)
    assert store.names(PATH) == ["1.json", "2.json"] or store.names(PATH) == ["2.json"]


@pytest.mark.parametrize("what", ["removed", "another's"])
def test_a_holder_whose_lease_is_gone_is_ended(store: Store, what: str) -> None:
    """Numbers begin anew when nobody holds it: that of another may be the same."""
    with pytest.raises(HeldError, match="taken over"), held(store, NAME, "embed", renew_s=0.1):
        if what == "removed":
            store.delete([f"{PATH}/1.json"])
        else:
            put(store, stranger())
        for _ in range(600):
            time.sleep(0.1)
    assert store.names(PATH) == ([] if what == "removed" else ["1.json"])


def test_of_many_that_follow_one_does(store: Store) -> None:
    put(store, stranger())
    racers = 8
    start, end = threading.Barrier(racers), threading.Barrier(racers)

    def race(_: int) -> bool:
        start.wait(60)
        try:
            with held(store, NAME, "embed", limit_s=0.5):
                end.wait(60)
                return True
        except HeldError:
            end.wait(60)
            return False

    with ThreadPoolExecutor(racers) as pool:
        assert sum(pool.map(race, range(racers))) == 1
    assert store.names("leases") == []


class Late(Store):
    """The real store, in which a holder goes and the next takes its epoch between a look and the taking."""

    def read(self, path: str, *rest: Any) -> bytes:
        if path == f"{PATH}/1.json" and not Late.over:
            Late.over = True
            self.delete([path])
            put(Store(self.root, self.options), this_process("embed"))
            raise FileNotFoundError(path)
        return super().read(path, *rest)

    over = False


def test_of_two_that_saw_the_same_holder_go_one_does(store: Store) -> None:
    put(store, stranger())
    Late.over = False
    with pytest.raises(HeldError), held(Late(store.root, store.options), NAME, "embed"):
        raise AssertionError("held by two")
    assert Late.over and store.names("leases") == ["embed/clip/1.json"]


def test_collecting_and_running_exclude_each_other(store: Store) -> None:
    with held(store, NAME, "embed"):
        with pytest.raises(HeldError), held(store, COLLECT, "collect", excludes=lambda other: True):
            raise AssertionError("both")
        with held(store, "embed/other", "embed"):
            assert store.names("leases") == ["embed/clip/1.json", "embed/other/1.json"]
    put(store, stranger())
    with (
        held(store, COLLECT, "collect", excludes=lambda other: True, limit_s=1),
        pytest.raises(HeldError),
        held(store, NAME, "embed"),
    ):
        raise AssertionError("both")
    assert store.names("leases") == []
