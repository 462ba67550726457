"""Images behind URLs: one GET each, bounded in bytes and in time, so that a dead host does not hold up a shard.

Whoever wrote the URL chooses what this machine connects to, and whoever answers can send it on. So hosts that
are not trusted are reached at public addresses alone, whatever their names resolve to, and are sent none of
the settings' credentials.
"""

from __future__ import annotations

import asyncio
import errno
import socket
from collections.abc import Mapping, Sequence
from contextlib import suppress
from time import monotonic
from typing import Any

import aiohttp
import fsspec
from aiohttp.helpers import get_env_proxy_for_url
from fsspec.asyn import sync
from tenacity import Retrying, retry_if_exception, stop_after_attempt, stop_after_delay, wait_random_exponential
from yarl import URL

from pipelines.secrets import public_headers
from pipelines.sources.addresses import is_public, leads_inside
from pipelines.sources.places import ALLOWING, is_web, lies_in, place_of
from pipelines.sources.text import Fault, printable
from pipelines.storage import protocol_of

ATTEMPTS = 6
# A server may be silent for so long, and no new attempt begins after it.
FETCH_TIMEOUT_S = 20
# One that trickles is left after this.
_ATTEMPT_TIMEOUT_S = 120
_CHUNK_BYTES = 2**18
_GONE = (404, 410)
_PASSING = (408, 425, 429)
_REDIRECTS = (301, 302, 303, 307, 308)
_MOST_REDIRECTS = 10
_FAULTS = (aiohttp.ClientError, OSError, ValueError)
_CREDENTIALS = ("auth", "cookies", "cookie_jar")


class ForbiddenError(OSError):
    """An address that this URL may not lead to."""


def get(
    url: str, options: Mapping[str, Mapping[str, Any]], most_bytes: int, trusted: Sequence[str] = ()
) -> bytes | Fault:
    """The first most_bytes of what the URL gives. options: of file systems, by protocol. trusted: places that
    need not be public.

    A server that is busy or silent is asked again for a while; no answer, and every answer but the image, is
    a Fault.
    """
    attempts = Retrying(
        retry=retry_if_exception(_passes),
        stop=stop_after_attempt(ATTEMPTS) | stop_after_delay(FETCH_TIMEOUT_S),
        wait=wait_random_exponential(multiplier=0.2, max=5),
        reraise=True,
    )
    try:
        return attempts(lambda: _followed(url, options, most_bytes, trusted))
    except ForbiddenError as error:
        return Fault("forbidden_url", printable(f"{url}: {error.strerror}"))
    except _FAULTS as error:
        reason = "not_found" if getattr(error, "status", None) in _GONE else "fetch_failed"
        return Fault(reason, printable(f"{url}: {type(error).__name__}: {error}"))


def is_known_inside(url: str) -> bool:
    """Whether the host of a URL, as far as can be told from here, is not of the public web."""
    try:
        host = URL(url).raw_host
    except ValueError:
        return False
    return bool(host) and leads_inside(str(host))


def _followed(url: str, options: Mapping[str, Mapping[str, Any]], most_bytes: int, trusted: Sequence[str]) -> bytes:
    """Through redirects, each looked at as the first URL was."""
    at = url
    deadline = monotonic() + _ATTEMPT_TIMEOUT_S
    for _ in range(_MOST_REDIRECTS + 1):
        given = options.get(protocol_of(at).lower(), {})
        fs = _client(at, given, trusted)
        # All hops in the time of one, unless the settings have a patience of their own.
        left = None if "timeout" in given.get("client_kwargs", {}) else deadline - monotonic()
        try:
            found: bytes | str = sync(fs.loop, _answer, fs, at, most_bytes, left)
        except aiohttp.ClientConnectorError as error:
            if isinstance(error.os_error, ForbiddenError):
                raise _no_public_address(at) from None
            raise
        if isinstance(found, bytes):
            return found
        if not is_web(found):
            raise ForbiddenError(errno.EACCES, f"it redirects to {found}")
        at = found
    raise ValueError(f"it redirects more than {_MOST_REDIRECTS} times")


def _client(url: str, given: Mapping[str, Any], trusted: Sequence[str]) -> Any:
    """fsspec's client of the web, with our patience unless the settings say otherwise. Raises: ForbiddenError."""
    patience = aiohttp.ClientTimeout(_ATTEMPT_TIMEOUT_S, connect=FETCH_TIMEOUT_S, sock_read=FETCH_TIMEOUT_S)
    client = {"timeout": patience, **given.get("client_kwargs", {})}
    if lies_in(url, trusted):
        return fsspec.filesystem("http", **{**given, "client_kwargs": client})
    careful = {**_for_strangers(given), "client_kwargs": _for_strangers(client)}
    if not _has_proxy(url, {**given, **client}):
        return fsspec.filesystem("http", **{**careful, "get_client": _public})
    # The proxy connects, and has the last word; what is known here of the host is checked here.
    if is_known_inside(url):
        raise _no_public_address(url)
    return fsspec.filesystem("http", **careful)


def _has_proxy(url: str, options: Mapping[str, Any]) -> bool:
    """Whether the settings name a proxy, or the environment that they trust names one for this URL."""
    if "proxy" in options or not options.get("trust_env"):
        return "proxy" in options
    with suppress(LookupError, ValueError):
        return bool(get_env_proxy_for_url(URL(url)))
    return False


def _for_strangers(options: Mapping[str, Any]) -> dict[str, Any]:
    """Without what says who we are: a URL in an input may be of any host."""
    kept = {name: value for name, value in options.items() if name not in (*_CREDENTIALS, "client_kwargs")}
    return kept | ({"headers": public_headers(kept["headers"])} if kept.get("headers") else {})


async def _public(**options: Any) -> aiohttp.ClientSession:
    """A session that connects to public addresses alone: looked at where each connection is made, so that no
    spelling, name server or redirect leads around it."""
    return aiohttp.ClientSession(**{**options, "connector": aiohttp.TCPConnector(socket_factory=_public_socket)})


def _public_socket(address_info: tuple[Any, ...]) -> socket.socket:
    family, kind, protocol, _, address = address_info
    if not is_public(str(address[0])):
        # One message for all addresses of a host, so that aiohttp passes on this very error.
        raise ForbiddenError(errno.EACCES, "no public address")
    return socket.socket(family, kind, protocol)


async def _answer(fs: Any, url: str, most_bytes: int, left_s: float | None) -> bytes | str:
    """The first bytes that the URL gives, or the URL that it redirects to."""
    session = await fs.set_session()
    data = bytearray()
    request = session.get(fs.encode_url(url), **{**fs.kwargs, "allow_redirects": False})
    async with asyncio.timeout(left_s), request as response:
        response.raise_for_status()
        target = response.headers.get("Location")
        if response.status in _REDIRECTS and target:
            return str(response.url.join(URL(target)))
        async for chunk in response.content.iter_chunked(_CHUNK_BYTES):
            data += chunk
            if len(data) >= most_bytes:
                break
    return bytes(data[:most_bytes])


def _no_public_address(url: str) -> ForbiddenError:
    return ForbiddenError(errno.EACCES, f"{place_of(url)} is at no public address: {ALLOWING}")


def _passes(error: BaseException) -> bool:
    """Of an answer by its status; anything else on the way there may be the network."""
    if isinstance(error, aiohttp.ClientResponseError):
        return error.status >= 500 or error.status in _PASSING
    is_final = isinstance(error, (ValueError, ForbiddenError))
    return isinstance(error, (aiohttp.ClientError, OSError)) and not is_final
