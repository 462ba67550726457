"""A proxy in front of an S3 server: counts what is read, and calls back when it sees a given request.

Signatures stay valid because the Host header passes unchanged. Run in a thread; loopback only.
"""

from __future__ import annotations

import asyncio
import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from urllib.parse import unquote

from aiohttp import ClientSession, TCPConnector, web
from yarl import URL

HOP_BY_HOP = {"connection", "keep-alive", "transfer-encoding", "te", "upgrade"}


@dataclass
class Trap:
    """Springs at the `at`-th request of `method` (* for any) whose path matches, or at every one.

    after: once the store has answered. The request's own connection is cut in any case.
    """

    method: str
    matches: Callable[[str], bool]
    spring: Callable[[], None]
    at: int = 1
    after: bool = False
    every: bool = False
    seen: int = 0

    def hit(self, method: str, path: str) -> bool:
        if self.method not in ("*", method) or not self.matches(path):
            return False
        self.seen += 1
        return self.every or self.seen == self.at


class S3Proxy:
    """`with S3Proxy("http://127.0.0.1:5000") as proxy: proxy.url`."""

    def __init__(self, upstream: str) -> None:
        self._upstream = upstream
        self.bytes_read: Counter[str] = Counter()
        self.trap: Trap | None = None
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

    async def _start(self) -> int:
        self._session = ClientSession(auto_decompress=False, connector=TCPConnector(limit=64))
        app = web.Application(client_max_size=2**30)
        app.router.add_route("*", "/{tail:.*}", self._handle)
        self._runner = web.AppRunner(app, access_log=None)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", 0)
        await site.start()
        return int(self._runner.addresses[0][1])

    async def _stop(self) -> None:
        await self._runner.cleanup()
        await self._session.close()

    async def _handle(self, request: web.Request) -> web.StreamResponse:
        path = unquote(request.path)
        trap = self.trap if self.trap and self.trap.hit(request.method, path) else None
        if trap and not trap.after:
            return self._spring(trap, request)
        response = await self._forward(request, path)
        if trap:
            return self._spring(trap, request)
        return response

    def _spring(self, trap: Trap, request: web.Request) -> web.Response:
        trap.spring()
        if request.transport:
            request.transport.abort()
        return web.Response()

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
