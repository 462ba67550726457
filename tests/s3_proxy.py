"""A proxy in front of an S3 server: counts what is read, calls back when it sees a given request, and makes faults.

Signatures stay valid because the Host header passes unchanged. Run in a thread; loopback only.
"""

from __future__ import annotations

import asyncio
import random
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from urllib.parse import unquote

from aiohttp import ClientSession, TCPConnector, web
from yarl import URL

HOP_BY_HOP = {"connection", "keep-alive", "transfer-encoding", "te", "upgrade"}


@dataclass
class Trap:
    """Springs at the `at`-th request of `method` (* for any) whose path matches, or at every one.

    after: once the store has answered. apart: in a thread, for what itself asks the store. The request's own
    connection is cut in any case.
    """

    method: str
    matches: Callable[[str], bool]
    spring: Callable[[], None]
    at: int = 1
    after: bool = False
    every: bool = False
    apart: bool = False
    seen: int = 0

    def hit(self, method: str, path: str) -> bool:
        if self.method not in ("*", method) or not self.matches(path):
            return False
        self.seen += 1
        return self.every or self.seen == self.at


# What S3 answers, by the fault's name.
ANSWERS = {
    "slow_down": (503, "SlowDown", "Please reduce your request rate."),
    "error": (500, "InternalError", "We encountered an internal error. Please try again."),
    "missing": (404, "NoSuchKey", "The specified key does not exist."),
    "refused": (403, "AccessDenied", "Access Denied"),
    "expired": (400, "ExpiredToken", "The provided token has expired."),
    "incomplete": (400, "IncompleteBody", "You did not provide the number of bytes specified by the header."),
}
PASSING = ("slow_down", "error", "reset", "lost", "torn", "short", "incomplete")


@dataclass
class Chaos:
    """Spoils a share of the requests, each in one of these ways:

    `slow_down`, `error`, `missing`, `refused`, `expired`, `incomplete`: answers so. `reset`: cuts the connection before the store
    sees the request, `lost`: after. `stall`: says nothing for stall_s, and then cuts it. `torn`: half of the body,
    and the connection cut. `short`: half of the body, said to be all of it.
    """

    rate: float
    kinds: tuple[str, ...] = PASSING
    seed: int = 0
    matches: Callable[[str, str], bool] = lambda method, path: True
    stall_s: float = 20.0
    made: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        self._random = random.Random(self.seed)

    def fault(self, method: str, path: str) -> str | None:
        if not self.matches(method, path) or self._random.random() >= self.rate:
            return None
        kind = self._random.choice(self.kinds)
        if (kind in ("torn", "short") and method != "GET") or (kind == "incomplete" and method != "PUT"):
            return None
        self.made[kind] += 1
        return kind


def answer(kind: str, method: str) -> web.Response:
    status, code, message = ANSWERS[kind]
    body = f"<?xml version='1.0' encoding='UTF-8'?><Error><Code>{code}</Code><Message>{message}</Message></Error>"
    return web.Response(status=status, text="" if method == "HEAD" else body, content_type="application/xml")


class S3Proxy:
    """`with S3Proxy("http://127.0.0.1:5000") as proxy: proxy.url`."""

    def __init__(self, upstream: str) -> None:
        self._upstream = upstream
        self.bytes_read: Counter[str] = Counter()
        self.trap: Trap | None = None
        self.chaos: Chaos | None = None
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)

    def __enter__(self) -> S3Proxy:
        self._thread.start()
        port = asyncio.run_coroutine_threadsafe(self._start(), self._loop).result(30)
        self.url = f"http://127.0.0.1:{port}"
        return self

    def __exit__(self, *_: object) -> None:
        asyncio.run_coroutine_threadsafe(self._stop(), self._loop).result(30)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(30)

    @contextmanager
    def set(self, trap: Trap) -> Iterator[None]:
        """Has the trap while the block runs."""
        self.trap = trap
        try:
            yield
        finally:
            self.trap = None

    async def _start(self) -> int:
        self._ended = asyncio.Event()
        self._session = ClientSession(auto_decompress=False, connector=TCPConnector(limit=64))
        app = web.Application(client_max_size=2**30)
        app.router.add_route("*", "/{tail:.*}", self._handle)
        self._runner = web.AppRunner(app, access_log=None)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", 0)
        await site.start()
        return int(self._runner.addresses[0][1])

    async def _stop(self) -> None:
        self._ended.set()
        await self._runner.cleanup()
        await self._session.close()

    async def _handle(self, request: web.Request) -> web.StreamResponse:
        path = unquote(request.path)
        trap = self.trap if self.trap and self.trap.hit(request.method, path) else None
        if trap and not trap.after:
            return await self._spring(trap, request)
        fault = self.chaos.fault(request.method, path) if self.chaos else None
        if fault:
            return await self._spoiled(fault, request, path)
        response = await self._forward(request, path)
        if trap:
            return await self._spring(trap, request)
        return response

    async def _spoiled(self, fault: str, request: web.Request, path: str) -> web.StreamResponse:
        if fault in ANSWERS:
            return answer(fault, request.method)
        if fault == "stall" and self.chaos:
            with suppress(TimeoutError):
                await asyncio.wait_for(self._ended.wait(), self.chaos.stall_s)
        if fault in ("reset", "stall"):
            return _cut(request)
        whole = await self._forward(request, path)
        if fault == "lost" or not isinstance(whole, web.Response) or not isinstance(whole.body, bytes):
            return _cut(request)
        half = whole.body[: len(whole.body) // 2]
        if fault == "short":
            return web.Response(status=whole.status, headers=_without_lengths(whole), body=half)
        torn = web.StreamResponse(status=whole.status, headers=_without_lengths(whole))
        torn.content_length = len(whole.body)
        await torn.prepare(request)
        await torn.write(half)
        return _cut(request, torn)

    async def _spring(self, trap: Trap, request: web.Request) -> web.StreamResponse:
        if trap.apart:
            await asyncio.to_thread(trap.spring)
        else:
            trap.spring()
        return _cut(request)

    async def _forward(self, request: web.Request, path: str) -> web.StreamResponse:
        headers = [(name, value) for name, value in request.headers.items() if name.lower() not in HOP_BY_HOP]
        url = URL(self._upstream + request.raw_path, encoded=True)
        body = await request.read()
        skip = ("Content-Type", "Accept", "User-Agent", "Accept-Encoding")
        async with self._session.request(
            request.method, url, headers=headers, data=body or None, skip_auto_headers=skip, allow_redirects=False
        ) as answer:
            data = await answer.read()
            kept = {name: value for name, value in answer.headers.items() if name.lower() not in HOP_BY_HOP}
            if request.method == "GET":
                self.bytes_read[path] += len(data)
            if request.method == "HEAD":
                response = web.StreamResponse(status=answer.status, headers=kept)
                await response.prepare(request)
                return response
            kept.pop("Content-Length", None)
            return web.Response(status=answer.status, headers=kept, body=data)


def _cut(request: web.Request, response: web.StreamResponse | None = None) -> web.StreamResponse:
    """Closes the connection; what was written may or may not have arrived."""
    if request.transport:
        request.transport.abort()
    return response or web.Response()


def _without_lengths(response: web.Response) -> dict[str, str]:
    """A checksum of the whole would tell at once."""
    told = ("content-length", "content-type")
    return {k: v for k, v in response.headers.items() if k.lower() not in told and "checksum" not in k.lower()}
