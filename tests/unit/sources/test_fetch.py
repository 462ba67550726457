"""Images by path and URL: what is a reject, and what is the store's fault and no reject."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import s3fs
from aiohttp import web as aiohttp_web

from pipelines.config import ReadConfig
from pipelines.errors import AccessError, InputError, StorageError
from pipelines.sources import plan_shards, samples, web
from pipelines.sources.fetch import read_bounded
from pipelines.sources.text import Fault
from pipelines.storage import Store
from tests.s3_proxy import S3Proxy
from tests.unit.sources.made import STORE, jpeg, plan, put, read, reasons
from tests.unit.test_storage_faults import Refusals

IMAGE = jpeg()
Answer = Callable[[BaseHTTPRequestHandler], None]


def told(found: bytes | Fault) -> str:
    assert isinstance(found, Fault)
    return found.reason


# -- a web server --------------------------------------------------------------------------------


@contextmanager
def serving(answer: Answer) -> Iterator[str]:
    """The URL of an image that every GET is answered with."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            answer(self)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/x.jpg"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def answering(*statuses: int, body: bytes = IMAGE) -> tuple[Answer, list[int]]:
    """Each status once and the last for ever; and those that were given."""
    given: list[int] = []

    def answer(request: BaseHTTPRequestHandler) -> None:
        given.append(statuses[min(len(given), len(statuses) - 1)])
        request.send_response(given[-1])
        request.send_header("Content-Length", str(len(body)))
        request.end_headers()
        request.wfile.write(body)

    return answer, given


@contextmanager
def silence() -> Iterator[str]:
    """The URL of a server that takes connections and never says a word."""
    with socket.create_server(("127.0.0.1", 0), backlog=64) as listening:
        yield f"http://127.0.0.1:{listening.getsockname()[1]}/x.jpg"


def origin(url: str) -> str:
    return url.removesuffix("?again").removesuffix("/x.jpg")


def refusing() -> str:
    with silence() as url:
        return url


@pytest.mark.parametrize(
    ("statuses", "asked", "expected"),
    [
        ((200,), 1, IMAGE),
        ((503, 429, 200), 3, IMAGE),
        ((404,), 1, "not_found"),
        ((410,), 1, "not_found"),
        ((403,), 1, "fetch_failed"),
        ((500,), 4, "fetch_failed"),
    ],
)
def test_what_a_web_server_answers(
    statuses: tuple[int, ...], asked: int, expected: bytes | str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(web, "ATTEMPTS", 4)
    answer, given = answering(*statuses)
    with serving(answer) as url:
        found = read_bounded(STORE, url, 10_000, [url])
    assert (found if isinstance(found, bytes) else found.reason) == expected
    assert len(given) == asked


def test_an_endless_image_is_read_up_to_what_is_allowed() -> None:
    def endless(request: BaseHTTPRequestHandler) -> None:
        request.send_response(200)
        request.end_headers()
        try:
            while True:
                request.wfile.write(b"x" * 2**16)
        except OSError:
            pass

    with serving(endless) as url:
        assert told(read_bounded(STORE, url, 2**20, [url])) == "image_too_large"


def test_a_body_that_breaks_off_is_no_image(monkeypatch: pytest.MonkeyPatch) -> None:
    def cut(request: BaseHTTPRequestHandler) -> None:
        request.send_response(200)
        request.send_header("Content-Length", "1000")
        request.end_headers()
        request.wfile.write(b"half")

    monkeypatch.setattr(web, "ATTEMPTS", 2)
    with serving(cut) as url:
        assert told(read_bounded(STORE, url, 10_000, [url])) == "fetch_failed"


def test_a_silent_host_costs_one_timeout(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(web, "FETCH_TIMEOUT_S", 0.5)
    with silence() as url:
        started = time.monotonic()
        assert told(read_bounded(STORE, url, 10_000, [url])) == "fetch_failed"
        assert 0.4 < time.monotonic() - started < 3


def test_a_host_that_trickles_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(web, "FETCH_TIMEOUT_S", 0.5)
    monkeypatch.setattr(web, "_ATTEMPT_TIMEOUT_S", 1)
    left = threading.Event()

    def trickle(request: BaseHTTPRequestHandler) -> None:
        request.send_response(200)
        request.end_headers()
        try:
            while not left.wait(0.1):
                request.wfile.write(b"x")
        except OSError:
            pass

    with serving(trickle) as url:
        started = time.monotonic()
        assert told(read_bounded(STORE, url, 10_000, [url])) == "fetch_failed"
        left.set()
        assert time.monotonic() - started < 4


@pytest.mark.parametrize("url", ["http://", "http:///x.jpg", "http://[::1/x.jpg", "http://h:99999999/x.jpg"])
def test_an_address_that_cannot_be_is_a_fault(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(web, "ATTEMPTS", 1)
    assert told(read_bounded(STORE, url, 10_000, [url])) == "fetch_failed"


def test_dead_urls_of_a_list_are_rejects_and_the_others_are_images(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(web, "ATTEMPTS", 2)
    with serving(answering(200)[0]) as there:
        urls = [there, refusing(), f"{there}?again"]
        records = [{"url": url, "caption": "c"} for url in urls]
        found = read(put("a.jsonl", "\n".join(map(json.dumps, records)).encode()), allow=[origin(url) for url in urls])
    assert [sample.image for sample in found] == [IMAGE, None, IMAGE]
    assert [reasons(sample) for sample in found] == [[], ["fetch_failed"], []]
    assert found[2].uri == urls[2]


def test_headers_of_the_settings_are_sent() -> None:
    seen: list[str | None] = []

    def note(request: BaseHTTPRequestHandler) -> None:
        seen.append(request.headers.get("X-Token"))
        answering(200)[0](request)

    with serving(note) as url:
        store = Store("", {"http": {"client_kwargs": {"headers": {"X-Token": "t"}}}})
        assert read_bounded(store, url, 10_000, [url]) == IMAGE
    assert seen == ["t"]


# -- where a URL may lead ------------------------------------------------------------------------


def spelled(url: str, host: str) -> str:
    return url.replace("127.0.0.1", host)


SPELLINGS = [
    "127.0.0.1", "localhost", "LOCALHOST", "0x7f000001", "0x7f.0.0.1", "0.0.0.0", "[::1]", "[::ffff:127.0.0.1]",
    "[::ffff:7f00:1]", "user:pass@127.0.0.1", "127\u30020.0.1",
]  # fmt: skip
# aiohttp itself takes none of these.
ODD_SPELLINGS = ["127.1", "2130706433", "0177.0.0.1", "127.0.0.1."]


@pytest.mark.parametrize("host", SPELLINGS)
def test_no_spelling_of_an_address_inside_is_fetched(host: str) -> None:
    answer, given = answering(200)
    with serving(answer) as url:
        found = read_bounded(STORE, spelled(url, host), 10_000)
    assert told(found) == "forbidden_url" and "read.allow" in found.detail
    assert given == []


@pytest.mark.parametrize("host", ODD_SPELLINGS)
def test_no_odd_spelling_of_one_either(host: str) -> None:
    answer, given = answering(200)
    with serving(answer) as url:
        assert told(read_bounded(STORE, spelled(url, host), 10_000)) in ("forbidden_url", "fetch_failed")
    assert given == []


@pytest.mark.parametrize("host", ["169.254.169.254", "10.0.0.5", "[fe80::1]", "[fd00:ec2::254]", "100.100.100.200"])
def test_what_clouds_tell_machines_is_not_fetched(host: str) -> None:
    assert told(read_bounded(STORE, f"http://{host}/latest/meta-data/", 10_000)) == "forbidden_url"


def test_a_forbidden_address_is_not_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[str] = []

    def noted(address: str) -> bool:
        tried.append(address)
        return False

    monkeypatch.setattr(web, "is_public", noted)
    assert told(read_bounded(STORE, "http://127.0.0.1:9/x.jpg", 10_000)) == "forbidden_url"
    assert tried == ["127.0.0.1"]


def test_one_port_of_a_host_does_not_open_another() -> None:
    answer, given = answering(200)
    with serving(answer) as url, serving(answering(200)[0]) as other:
        assert told(read_bounded(STORE, url, 10_000, [origin(other)])) == "forbidden_url"
        assert read_bounded(STORE, other, 10_000, [origin(other)]) == IMAGE
    assert given == []


def redirecting(*targets: str) -> tuple[Answer, list[str]]:
    """To each in turn and to the last for ever; and the paths that were asked for."""
    asked: list[str] = []

    def answer(request: BaseHTTPRequestHandler) -> None:
        target = targets[min(len(asked), len(targets) - 1)]
        # Before the answer, which may have the caller look.
        asked.append(request.path)
        request.send_response(302)
        request.send_header("Location", target)
        request.send_header("Content-Length", "0")
        request.end_headers()

    return answer, asked


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "[::ffff:127.0.0.1]", "169.254.169.254"])
def test_a_redirect_to_an_address_inside_is_not_followed(host: str) -> None:
    inside, given = answering(200)
    with serving(inside) as target:
        answer, asked = redirecting(spelled(target, host))
        with serving(answer) as url:
            assert told(read_bounded(STORE, url, 10_000, [origin(url)])) == "forbidden_url"
    assert asked == ["/x.jpg"] and given == []


@pytest.mark.parametrize("target", ["file:///etc/passwd", "s3://bucket/x.jpg", "ftp://127.0.0.1/x.jpg", "data:,x"])
def test_a_redirect_to_what_is_not_the_web_is_not_followed(target: str) -> None:
    answer, asked = redirecting(target)
    with serving(answer) as url:
        assert told(read_bounded(STORE, url, 10_000, [origin(url)])) == "forbidden_url"
    assert asked == ["/x.jpg"]


def test_redirects_to_what_is_allowed_are_followed_to_an_end() -> None:
    with serving(answering(200)[0]) as target:
        answer, asked = redirecting("y.jpg", "/z.jpg", target)
        with serving(answer) as url:
            assert read_bounded(STORE, url, 10_000, [origin(url), origin(target)]) == IMAGE
        assert asked == ["/x.jpg", "/y.jpg", "/z.jpg"]
    answer, asked = redirecting("x.jpg")
    with serving(answer) as url:
        assert told(read_bounded(STORE, url, 10_000, [origin(url)])) == "fetch_failed"
    assert len(asked) == 11


def test_strangers_are_sent_no_credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[dict[str, str]] = []

    def note(request: BaseHTTPRequestHandler) -> None:
        seen.append({name.lower(): value for name, value in request.headers.items()})
        answering(200)[0](request)

    headers = {"X-Token": "t", "Authorization": "Bearer b", "User-Agent": "ours"}
    options = {"client_kwargs": {"headers": headers, "cookies": {"session": "s"}}, "headers": {"X-Other": "o"}}
    store = Store("", {"http": options})
    with serving(note) as url:
        assert read_bounded(store, url, 10_000, [origin(url)]) == IMAGE
        monkeypatch.setattr(web, "is_public", lambda address: True)
        assert read_bounded(store, url, 10_000) == IMAGE
    ours, strangers = seen
    sent = {"x-token": "t", "authorization": "Bearer b", "x-other": "o", "cookie": "session=s", "user-agent": "ours"}
    assert ours.items() >= sent.items()
    assert strangers.keys() & sent.keys() == {"user-agent"} and strangers["user-agent"] == "ours"


def test_through_a_proxy_what_is_known_to_be_inside_is_not_asked_for() -> None:
    answer, given = answering(200)
    with serving(answer) as url:
        store = Store("", {"http": {"proxy": origin(url)}})
        assert read_bounded(store, "http://nowhere.invalid/x.jpg", 10_000) == IMAGE
        for host in ("169.254.169.254", "0x7f.1", "localhost"):
            assert told(read_bounded(store, f"http://{host}/x.jpg", 10_000)) == "forbidden_url"
    assert given == [200]


def test_a_proxy_of_the_environment_is_a_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    answer, given = answering(200)
    store = Store("", {"http": {"client_kwargs": {"trust_env": True}}})
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("NO_PROXY", raising=False)
    with serving(answer) as url:
        monkeypatch.setenv("http_proxy", origin(url))
        assert read_bounded(store, "http://nowhere.invalid/x.jpg", 10_000) == IMAGE
        for host in ("169.254.169.254", "0x7f.1", "localhost"):
            assert told(read_bounded(store, f"http://{host}/x.jpg", 10_000)) == "forbidden_url"
        monkeypatch.delenv("http_proxy")
        assert told(read_bounded(store, url, 10_000)) == "forbidden_url"
        monkeypatch.setattr(web, "is_known_inside", lambda url: False)
        assert told(read_bounded(store, url, 10_000)) == "forbidden_url"  # without one, connections are looked at
    assert given == [200]


def test_all_redirects_have_the_time_of_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(web, "_ATTEMPT_TIMEOUT_S", 1)
    monkeypatch.setattr(web, "ATTEMPTS", 1)
    onward, asked = redirecting("x.jpg")

    def slowly(request: BaseHTTPRequestHandler) -> None:
        time.sleep(0.4)
        onward(request)

    with serving(slowly) as url:
        found = read_bounded(STORE, url, 10_000, [origin(url)])
    assert isinstance(found, Fault) and "TimeoutError" in found.detail
    assert len(asked) <= 4


# -- an object store -----------------------------------------------------------------------------


@pytest.fixture
def proxy(s3_options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> Iterator[S3Proxy]:
    monkeypatch.setattr(s3fs.S3FileSystem, "retries", 1)
    monkeypatch.setattr("pipelines.retry.ATTEMPTS", 2)
    with S3Proxy(s3_options["endpoint_url"]) as proxy:
        yield proxy


def store_at(url: str) -> Store:
    """Of a client that does not try again by itself."""
    once = {"config_kwargs": {"retries": {"max_attempts": 0}}}
    return Store("", {"s3": {"endpoint_url": url, "key": "testkey", "secret": "testsecret", **once}})


@pytest.mark.parametrize("method", ["HEAD", "GET"])
@pytest.mark.parametrize(
    ("answer", "error"),
    [(aiohttp_web.HTTPForbidden, AccessError), (aiohttp_web.HTTPServiceUnavailable, StorageError)],
)
def test_a_store_that_refuses_or_fails_is_no_reject(
    proxy: S3Proxy, method: str, answer: type[aiohttp_web.HTTPException], error: type[Exception]
) -> None:
    store = store_at(proxy.url)
    store.put_atomic("s3://bucket/images/x.jpg", IMAGE)
    records = [{"image": "images/x.jpg"}, {"image": "images/gone.jpg"}]
    store.put_atomic("s3://bucket/a.jsonl", "\n".join(map(json.dumps, records)).encode())
    (shard,), _ = plan_shards(["s3://bucket/a.jsonl"], "auto", ReadConfig(), store, {})
    proxy.trap = Refusals(method, "/images/x.jpg", answer, 1_000)
    with pytest.raises(error):
        list(samples(shard, ReadConfig(), store))
    proxy.trap = None
    assert [reasons(sample) for sample in samples(shard, ReadConfig(), store)] == [[], ["not_found"]]


@pytest.mark.usefixtures("proxy")
def test_a_store_that_is_gone_is_no_reject() -> None:
    with pytest.raises(StorageError):
        read_bounded(store_at(refusing().removesuffix("/x.jpg")), "s3://bucket/x.jpg", 10_000)


def test_a_name_that_no_store_can_have_is_a_reject(proxy: S3Proxy) -> None:
    assert told(read_bounded(store_at(proxy.url), "s3://No bucket!/x.jpg", 10_000)) == "not_found"
    for uri in ("s3://bucket", "s3://", "s3:///x.jpg", "s3://bucket/\ud800.jpg"):
        assert told(read_bounded(store_at(proxy.url), uri, 10_000)) == "fetch_failed"


def test_a_store_that_is_set_up_wrongly_is_no_reject() -> None:
    with pytest.raises(InputError, match=r"(?s)Invalid endpoint.*check the storage settings"):
        read_bounded(store_at("localhost:9000"), "s3://bucket/x.jpg", 10_000)


def test_odd_local_paths_are_rejects(tmp_path: Path) -> None:
    (tmp_path / "x.jpg").write_bytes(IMAGE)
    names = ["x.jpg", "gone.jpg", "x.jpg/y.jpg", "n" * 300 + ".jpg", ".", "\ud800.jpg"]
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"image": name}) for name in names))
    found = read(tmp_path / "a.jsonl")
    assert [reasons(sample) for sample in found] == [[], *[["not_found"]] * 3, ["not_a_file"], ["fetch_failed"]]


def test_a_local_file_that_may_not_be_read_is_no_reject(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "x.jpg").write_bytes(IMAGE)
    (tmp_path / "a.jsonl").write_text('{"image": "x.jpg"}')
    (shard,) = plan(tmp_path / "a.jsonl")

    class Refusing(Store):
        def open(self, path: str) -> Any:
            if path.endswith(".jpg"):
                raise AccessError(f"Cannot open {path}")
            return super().open(path)

    with pytest.raises(AccessError):
        list(samples(shard, ReadConfig(), Refusing()))


def test_a_client_that_is_not_installed_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(store: Store, path: str) -> Any:
        raise ImportError("Please install gcsfs")

    monkeypatch.setattr(Store, "open", missing)
    with pytest.raises(InputError, match=r"(?s)gs://b/x\.jpg cannot be opened: Please install gcsfs.*every node"):
        read_bounded(STORE, "gs://b/x.jpg", 10_000)
