"""Images behind URLs: one GET each, bounded in bytes and in time, so that a dead host does not hold up a shard."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import aiohttp
import fsspec
from fsspec.asyn import sync
from tenacity import Retrying, retry_if_exception, stop_after_attempt, stop_after_delay, wait_random_exponential

from pipelines.sources.text import Fault, printable

ATTEMPTS = 6
# A server may be silent for so long, and no new attempt begins after it.
FETCH_TIMEOUT_S = 20
# One that trickles is left after this.
_ATTEMPT_TIMEOUT_S = 120
_CHUNK_BYTES = 2**18
_GONE = (404, 410)
_PASSING = (408, 425, 429)
_FAULTS = (aiohttp.ClientError, OSError, ValueError)


def get(url: str, options: Mapping[str, Mapping[str, Any]], most_bytes: int) -> bytes | Fault:
    """The first most_bytes of what the URL gives. options: of file systems, by protocol.

    A server that is busy or silent is asked again for a while; no answer, and every answer but the image, is
    a Fault.
    """
    attempts = Retrying(
        retry=retry_if_exception(_passes),
        stop=stop_after_attempt(ATTEMPTS) | stop_after_delay(FETCH_TIMEOUT_S),
        wait=wait_random_exponential(multiplier=0.2, max=5),
        reraise=True,
    )
    fs = _client(options.get(url.partition(":")[0], {}))
    try:
        return attempts(lambda: bytes(sync(fs.loop, _body, fs, url, most_bytes)))
    except _FAULTS as error:
        reason = "not_found" if getattr(error, "status", None) in _GONE else "fetch_failed"
        return Fault(reason, printable(f"{url}: {type(error).__name__}: {error}"))


def _client(options: Mapping[str, Any]) -> Any:
    """fsspec's client of the web, with our patience unless the options say otherwise."""
    patience = aiohttp.ClientTimeout(_ATTEMPT_TIMEOUT_S, connect=FETCH_TIMEOUT_S, sock_read=FETCH_TIMEOUT_S)
    return fsspec.filesystem(
        "http", **{**options, "client_kwargs": {"timeout": patience, **options.get("client_kwargs", {})}}
    )


async def _body(fs: Any, url: str, most_bytes: int) -> bytes:
    session = await fs.set_session()
    data = bytearray()
    async with session.get(fs.encode_url(url), **fs.kwargs) as response:
        response.raise_for_status()
        async for chunk in response.content.iter_chunked(_CHUNK_BYTES):
            data += chunk
            if len(data) >= most_bytes:
                break
    return bytes(data[:most_bytes])


def _passes(error: BaseException) -> bool:
    """Of an answer by its status; anything else on the way there may be the network."""
    if isinstance(error, aiohttp.ClientResponseError):
        return error.status >= 500 or error.status in _PASSING
    return isinstance(error, (aiohttp.ClientError, OSError)) and not isinstance(error, ValueError)
