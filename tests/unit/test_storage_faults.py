"""What storage does when a server is busy, refuses, or breaks off: real servers on loopback, no mocks."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from uuid import uuid4

import numpy as np
import pytest
import s3fs
from aiohttp import web

from pipelines.config import WriteConfig
from pipelines.errors import AccessError, StorageError
from pipelines.lease import held
from pipelines.ledger import tally
from pipelines.storage import Store
from pipelines.verify import problems
from pipelines.write import EmbeddingSink
from tests.encoded import ENCODER, FAMILIES, encoded_rows
from tests.s3_proxy import Chaos, S3Proxy, Trap

KEYS = {"key": "testkey", "secret": "testsecret"}
DATA = np.random.default_rng(0).bytes(3_000_000)


class Refusals(Trap):
    """Answers the first `times` matching requests with an error instead of passing them on."""

    def __init__(self, method: str, path: str, answer: type[web.HTTPException], times: int) -> None:
        super().__init__(method, lambda asked: path in asked, self._refuse)
        self._answer, self._times = answer, times

    def hit(self, method: str, path: str) -> bool:
        if method == self.method and self.matches(path):
            self.seen += 1
            return self.seen <= self._times
        return False

    def _refuse(self) -> None:
        raise self._answer


@pytest.fixture
def proxy(s3_options: dict[str, Any]) -> Iterator[S3Proxy]:
    with S3Proxy(s3_options["endpoint_url"]) as proxy:
        yield proxy


def behind(proxy: S3Proxy) -> Store:
    """A store whose client itself does not try again, so that it is we who do."""
    once = {"config_kwargs": {"retries": {"max_attempts": 0}}}
    return Store(f"s3://bucket/{uuid4().hex}", {"s3": {"endpoint_url": proxy.url, **KEYS, **once}})


@pytest.fixture
def impatient_client(monkeypatch: pytest.MonkeyPatch) -> None:
    """s3fs tries five times by itself."""
    monkeypatch.setattr(s3fs.S3FileSystem, "retries", 1)


@pytest.mark.usefixtures("impatient_client")
def test_a_store_that_is_busy_is_asked_again(proxy: S3Proxy) -> None:
    store = behind(proxy)
    calls: list[tuple[str, Callable[[], Any], Any]] = [
        ("PUT", lambda: store.put_atomic("a/b", b"1"), None),
        ("GET", lambda: store.read("a/b"), b"1"),
        ("HEAD", lambda: store.stat("a/b").bytes, 1),
        ("GET", lambda: store.names("a"), ["b"]),
        ("PUT", lambda: store.copy("a/b", "a/c"), None),
        ("PUT", lambda: store.put_if_absent("a/d", b"1"), True),
        ("DELETE", lambda: store.delete(["a/d"]), None),
    ]
    for method, call, expected in calls:
        proxy.trap = Refusals(method, "", web.HTTPServiceUnavailable, 2)
        assert call() == expected, method
        assert proxy.trap.seen > 2, method


@pytest.mark.usefixtures("impatient_client")
def test_a_store_that_stays_busy_is_told_with_the_object_and_the_fix(
    proxy: S3Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipelines.retry.ATTEMPTS", 2)
    store = behind(proxy)
    proxy.trap = Refusals("PUT", "", web.HTTPServiceUnavailable, 1_000)
    with pytest.raises(StorageError, match=r"(?s)Cannot write s3://bucket/\w+/a: .*run the same command again"):
        store.put_atomic("a", b"1")
    assert proxy.trap.seen == 2


@pytest.mark.usefixtures("impatient_client")
@pytest.mark.parametrize(
    ("answer", "error"), [(web.HTTPForbidden, PermissionError), (web.HTTPNotFound, FileNotFoundError)]
)
def test_a_final_answer_is_not_asked_for_again(
    proxy: S3Proxy, answer: type[web.HTTPException], error: type[Exception]
) -> None:
    store = behind(proxy)
    store.put_atomic("a", b"1")
    proxy.trap = Refusals("GET", "/a", answer, 1_000)
    with pytest.raises(error):
        store.read("a")
    assert proxy.trap.seen == 1


@pytest.mark.usefixtures("impatient_client")
def test_what_is_known_to_be_there_is_asked_for_again(proxy: S3Proxy) -> None:
    """A store that says once that it is not: the lease of a live run, parts that were just staged, a listed commit."""
    store = behind(proxy)
    missing = [Refusals(method, path, web.HTTPNotFound, 1)
               for method, path in (("GET", "/leases/"), ("PUT", "/samples/part-"), ("GET", "/commits/"))]  # fmt: skip
    with held(store, "embed/clip", "embed", renew_s=0.05), proxy.set(missing[0]):
        while missing[0].seen < 3:
            time.sleep(0.05)
    with proxy.set(missing[1]):
        EmbeddingSink(store, FAMILIES, WriteConfig()).write([encoded_rows(range(5), 5)], None)
    with proxy.set(missing[2]):
        assert tally(store, [ENCODER.name])[2] == 1
    assert list(problems(store)) == [] and all(each.seen > 1 for each in missing)


def test_credentials_that_have_expired_are_told_where_the_answer_cannot_say_so(proxy: S3Proxy) -> None:
    """To a HEAD there is no body; what came is a call that is wrong."""
    store = behind(proxy)
    store.put_atomic("a", b"1")
    proxy.chaos = Chaos(1.0, ("expired",), matches=lambda method, path: method == "HEAD")
    for call in (lambda: store.stat("a"), lambda: store.open("a", listed=True).read()):
        with pytest.raises(AccessError, match=r"(?s)access was refused.*expired.*Check the credentials"):
            call()


@pytest.mark.usefixtures("impatient_client")
def test_what_did_not_come_whole_is_sent_again(proxy: S3Proxy) -> None:
    store, spoiled = behind(proxy), [True]
    proxy.chaos = Chaos(1.0, ("incomplete",), matches=lambda method, path: bool(spoiled) and spoiled.pop())
    store.put_atomic("a", b"1")
    assert proxy.chaos.made["incomplete"] == 1 and store.read("a") == b"1"


def test_an_acknowledgement_that_was_lost_leaves_one_object(proxy: S3Proxy) -> None:
    """False although it is ours: whoever calls reads it to know."""
    store = behind(proxy)
    proxy.trap = Trap("PUT", lambda path: path.endswith("/commit"), lambda: None, after=True)
    assert store.put_if_absent("commit", b"ours") is False
    assert proxy.trap.seen and store.read("commit") == b"ours"


# -- a body that breaks off ----------------------------------------------------------------------


@dataclass
class Web:
    """A web server of one object. cuts: how many answers break off half-way; status: of every other answer."""

    ranges: bool = True
    cuts: int = 0
    status: int = 200
    asked: list[str] = field(default_factory=list)

    def __enter__(self) -> Web:
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,))
        self._thread.start()
        self.url = f"http://127.0.0.1:{self._server.server_port}/a.tar"
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                server.answer(self)

            def do_HEAD(self) -> None:
                server.answer(self)

            def log_message(self, *_: object) -> None:
                pass

        return Handler

    def answer(self, request: BaseHTTPRequestHandler) -> None:
        self.asked.append(request.command)
        start, stop = self._range(request.headers.get("Range"))
        partial = self.ranges and "Range" in request.headers
        request.send_response(206 if partial else self.status)
        if self.ranges:
            request.send_header("Accept-Ranges", "bytes")
        if partial:
            request.send_header("Content-Range", f"bytes {start}-{stop - 1}/{len(DATA)}")
        request.send_header("Content-Length", str(stop - start))
        request.end_headers()
        if request.command == "GET":
            request.wfile.write(DATA[start : self._end(start, stop)])

    def _range(self, asked: str | None) -> tuple[int, int]:
        if not (asked and self.ranges):
            return 0, len(DATA)
        first, _, last = asked.removeprefix("bytes=").partition("-")
        return int(first), min(int(last or len(DATA)) + 1, len(DATA))

    def _end(self, start: int, stop: int) -> int:
        if stop - start < 1_000 or not self.cuts:
            return stop
        self.cuts -= 1
        return (start + stop) // 2


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> Store:
    """Reads a tenth of DATA at a time, so that it breaks off in the middle."""
    monkeypatch.setattr("pipelines.stream.READ_BLOCK_BYTES", len(DATA) // 10)
    return Store(options={"http": {"skip_instance_cache": True}})


@pytest.mark.parametrize("ranges", [True, False], ids=["ranges", "no ranges"])
@pytest.mark.parametrize("cuts", [0, 1, 3])
def test_a_stream_goes_on_where_it_broke_off(store: Store, ranges: bool, cuts: int) -> None:
    with Web(ranges, cuts) as server, store.open(server.url) as file:
        head = file.read(1_000)
        assert head + file.read() == DATA
        assert server.cuts == 0


def test_a_stream_seeks(store: Store) -> None:
    with Web(cuts=2) as server, store.open(server.url) as file:
        assert file.seek(2_000_000) == 2_000_000 == file.tell()
        assert file.read(500_000) == DATA[2_000_000:2_500_000]
        assert file.seek(-10, 2) == len(DATA) - 10
        assert file.read() == DATA[-10:]


def test_a_stream_of_a_web_server_without_ranges_does_not_seek(store: Store) -> None:
    with Web(ranges=False) as server, store.open(server.url) as file:
        assert file.read(1_000) + file.read(len(DATA) // 2) == DATA[: 1_000 + len(DATA) // 2]
        with pytest.raises(StorageError, match=r"(?s)Cannot seek in http://.*storage that answers range requests"):
            file.seek(0)


def test_a_stream_that_always_breaks_off_is_told(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipelines.retry.ATTEMPTS", 2)
    with (
        Web(cuts=1_000) as server,
        pytest.raises(StorageError, match=r"(?s)Cannot read http://.*at byte 0.*again"),
        store.open(server.url) as file,
    ):
        file.read()


def test_an_object_on_s3_is_read_whole_although_answers_break_off(s3_options: dict[str, Any], proxy: S3Proxy) -> None:
    store = behind(proxy)
    store.put_atomic("a", DATA)
    proxy.trap = Trap("GET", lambda path: path.endswith("/a"), lambda: None, after=True)
    with store.open("a") as file:
        assert file.read() == DATA
    assert proxy.trap.seen
    assert store.read("a") == DATA


@pytest.mark.parametrize(("status", "asked"), [(403, 1), (410, 1), (500, 3), (429, 3)])
def test_a_web_server_that_refuses_is_asked_once_and_one_that_fails_again(
    store: Store, monkeypatch: pytest.MonkeyPatch, status: int, asked: int
) -> None:
    monkeypatch.setattr("pipelines.retry.ATTEMPTS", 3)
    with Web(status=status) as server:
        with pytest.raises(StorageError, match=rf"(?s)Cannot read http://.*{status}"):
            store.read(server.url)
        assert server.asked == ["GET"] * asked


def test_a_server_that_is_not_there_is_told(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipelines.retry.ATTEMPTS", 2)
    with Web() as server:
        url = server.url
    with pytest.raises(StorageError, match=r"(?s)Cannot look up http://.*Check that the storage is reachable"):
        store.stat(url)
