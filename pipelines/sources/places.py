"""Where an input may lead: its own folder, bucket or web host, and the places that `read.allow` lists."""

from __future__ import annotations

import json
import os
import posixpath
import shlex
from collections.abc import Iterable, Sequence

from yarl import URL

from pipelines.storage import is_local, protocol_of, whole_uri

ALLOWING = "the setting read.allow can allow that place"

WEB = ("http", "https")
_ALIASES = {"s3a": "s3", "gcs": "gs", "abfss": "abfs", "az": "abfs"}
_BUCKETS = frozenset(("s3", "gs", "abfs"))


def allowing(place: str, allow: Sequence[str]) -> str:
    """The flag that allows one more place, as a shell takes it."""
    return f"--set read.allow={shlex.quote(json.dumps([*allow, place]))}"


def is_web(uri: str) -> bool:
    return protocol_of(uri).lower() in WEB


def is_bucket(uri: str) -> bool:
    return _kind(uri) in _BUCKETS


def own_place(listing: str) -> str:
    """What a listing may name without further ado: its folder, its bucket, or its web host."""
    return "memory://" if protocol_of(listing) == "memory" else _widest(listing)


def place_of(uri: str) -> str:
    """The place to allow so that `uri` is allowed: a folder as the disk has it, a bucket, or a host."""
    return posixpath.dirname(_real(uri)) if is_local(uri) else _widest(uri)


def lies_in(uri: str, places: Iterable[str]) -> bool:
    """Whether `uri` is one of the places or below it: by whole parts of its path, after `..` and symbolic links."""
    return any(_lies_in(uri, place) for place in places)


def _lies_in(uri: str, place: str) -> bool:
    if is_local(uri) or is_local(place):
        return is_local(uri) and is_local(place) and _is_below(_parts(_real(uri)), _parts(_real(place)))
    if is_web(uri) or is_web(place):
        return is_web(uri) and is_web(place) and _is_on(uri, place)
    return _kind(uri) == _kind(place) and _is_below(_parts(_path(uri)), _parts(_path(place)))


def _is_on(uri: str, place: str) -> bool:
    try:
        url, allowed = URL(uri), URL(place)
        return _host(url) == _host(allowed) and _is_below(_parts(_flat(url.path)), _parts(_flat(allowed.path)))
    except ValueError:
        return False


def _host(url: URL) -> tuple[str, str | None, int | None]:
    return url.scheme, url.raw_host, url.port


def _is_below(parts: list[str], above: list[str]) -> bool:
    return parts[: len(above)] == above


def _widest(uri: str) -> str:
    if is_local(uri):
        return posixpath.dirname(whole_uri(uri))
    if is_web(uri):
        return _origin(uri)
    if is_bucket(uri):
        return f"{protocol_of(uri)}://{_parts(_path(uri))[0] if _parts(_path(uri)) else ''}"
    return posixpath.dirname(uri)


def _origin(uri: str) -> str:
    try:
        return str(URL(uri).origin())
    except ValueError:
        return uri


def _kind(uri: str) -> str:
    protocol = protocol_of(uri)
    return _ALIASES.get(protocol, protocol)


def _path(uri: str) -> str:
    return _flat(uri.partition("://")[2])


def _flat(path: str) -> str:
    """Without `..` and `.`, which a client or server may take out too."""
    return posixpath.normpath(path) if any(part in ("..", ".") for part in path.split("/")) else path


def _parts(path: str) -> list[str]:
    return [part for part in path.split("/") if part]


def _real(uri: str) -> str:
    """Where a local path leads on the disk; a name that no disk can have leads where it says."""
    path = whole_uri(uri)
    try:
        return os.path.realpath(path)
    except ValueError:
        return os.path.normpath(path)
