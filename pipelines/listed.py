"""What fsspec tells of objects, in one spelling whatever the file system: their address, size and etag."""

from __future__ import annotations

import errno
from collections.abc import Iterable
from datetime import datetime
from typing import Any

from fsspec.implementations.local import LocalFileSystem

from pipelines.contracts import Entry


def plain(uri: str) -> str:
    return uri.removeprefix("file://").removeprefix("local://")


def _entry(fs: Any, info: dict[str, Any]) -> Entry:
    return Entry(plain(fs.unstrip_protocol(info["name"])), int(info.get("size") or 0), etag_of(info))


def files(fs: Any, found: Iterable[dict[str, Any]]) -> list[Entry]:
    """Sorted by name. A listing tells of a symbolic link itself, and of what it leads to only when asked."""
    followed = (_followed(fs, info) if info.get("islink") else info for info in found)
    return sorted((_entry(fs, info) for info in followed if info["type"] == "file"), key=lambda entry: entry.uri)


def _followed(fs: Any, info: dict[str, Any]) -> dict[str, Any]:
    try:
        return dict(fs.info(info["name"]))
    except OSError as error:
        if not isinstance(error, FileNotFoundError) and error.errno != errno.ELOOP:
            raise
        return {**info, "type": "broken link"}


def whole_walk(fs: Any) -> dict[str, Any]:
    """fsspec leaves out a local folder that it may not read; its files would be taken to have vanished."""
    return {"on_error": _raise_unless_gone} if isinstance(fs, LocalFileSystem) else {}


def _raise_unless_gone(error: OSError) -> None:
    if not isinstance(error, FileNotFoundError | NotADirectoryError):
        raise error


def etag_of(info: dict[str, Any]) -> str:
    """A token that changes when the object does, from whatever the file system tells."""
    for field_name in ("ETag", "etag", "md5Hash", "mtime", "LastModified", "Last-Modified", "created"):
        value = info.get(field_name)
        if value:
            # Some file systems tell a time as a datetime in one call and as seconds in another.
            return str(value.timestamp() if isinstance(value, datetime) else value).strip('"')
    return ""
