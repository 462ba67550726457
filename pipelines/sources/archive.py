"""A tar as a stream of headers and bounded reads: nothing on disk, no link followed, the whole never in memory.

Python's own `tarfile` takes a broken header in the middle, and a cut one, for the end of the archive, and so
loses whatever came after without a word. Format: POSIX.1-2001 (ustar, pax) and GNU tar.
"""

from __future__ import annotations

import gzip
import tarfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO

from pipelines.sources.text import Fault

BLOCK = tarfile.BLOCKSIZE
_CHUNK_BYTES = 2**20
_MAX_EXTENSION_BYTES = 2**20
# Archives may be joined end to end, with padding between; what is gzipped may be padding without an end.
_MAX_PADDING_BLOCKS = 2**17
_LONG_NAME, _LONG_LINK = tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK
_SPARSE = b"GNU.sparse."
_PAX = (tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE)


class BrokenArchiveError(Exception):
    """The archive cannot be read on. inside: the break is in the bytes of the last header's member."""

    def __init__(self, fault: Fault, inside: bool) -> None:
        super().__init__(fault.detail)
        self.fault = fault
        self.inside = inside


@dataclass(frozen=True)
class Header:
    """A member. offset, size: its bytes in the uncompressed tar. what: `file`, or what it is instead."""

    name: str
    offset: int
    size: int
    what: str


class Archive:
    """Headers in order; `read` gives the bytes of the header that was yielded last."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream
        self._at = 0
        self._inside = False

    def headers(self) -> Iterator[Header]:
        """Every member but directories. Raises BrokenArchiveError where the archive breaks off."""
        while (header := self._next()) is not None:
            if header.what != "folder":
                yield header
            self._inside = True
            self._skip(header.offset + header.size - self._at)
            self._inside = False
            self._read(-header.size % BLOCK)

    def read(self, header: Header) -> bytes:
        """The member's bytes, all at once: check the size first."""
        self._inside = True
        return self._exactly(header.size)

    def _next(self) -> Header | None:
        """The next member, with what extended headers say of it; None at the end."""
        overrides: dict[str, bytes] = {}
        while (info := self._header()) is not None:
            if info.type in (*_PAX, tarfile.XGLTYPE, _LONG_NAME, _LONG_LINK):
                overrides |= self._extension(info)
            else:
                return self._member(info, overrides)
        return None

    def _header(self) -> tarfile.TarInfo | None:
        ended = 0
        while True:
            at, block = self._at, self._read(BLOCK)
            if len(block) < BLOCK:
                if ended:
                    return None
                raise self._broken("truncated_shard", f"ends at byte {self._at} without an end mark")
            if not any(block):
                ended += 1
                if ended > _MAX_PADDING_BLOCKS:
                    padding = _MAX_PADDING_BLOCKS * BLOCK >> 20
                    raise self._broken("corrupt_shard", f"more than {padding} MiB of padding; the rest is not read")
                continue
            try:
                return tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
            except (tarfile.HeaderError, ValueError) as error:
                if ended:
                    return None
                raise self._broken("corrupt_shard", f"no tar header at byte {at} ({error}); the rest is lost") from None

    def _extension(self, info: tarfile.TarInfo) -> dict[str, bytes]:
        if not 0 <= info.size <= _MAX_EXTENSION_BYTES:
            raise self._broken("corrupt_shard", f"extended header of {info.size} bytes at byte {self._at}")
        data = self._exactly(info.size)
        self._exactly(-info.size % BLOCK)
        if info.type == _LONG_NAME:
            return {"path": data.partition(b"\0")[0]}
        if info.type in _PAX:
            return self._pax(data)
        return {}

    def _pax(self, data: bytes) -> dict[str, bytes]:
        """Records `length key=value\\n`, the length being that of the whole record."""
        records: dict[str, bytes] = {}
        while data.strip(b"\0"):
            length, _, rest = data.partition(b" ")
            if not length.isdigit() or not 0 < int(length) <= len(data):
                raise self._broken("corrupt_shard", f"bad pax record before byte {self._at}")
            name, _, value = rest[: int(length) - len(length) - 2].partition(b"=")
            # The rest is of no use here, and may be without end.
            if name in (b"path", b"size"):
                records[name.decode()] = value
            elif name.startswith(_SPARSE):
                records[_SPARSE.decode()] = b""
            data = data[int(length) :]
        return records

    def _member(self, info: tarfile.TarInfo, overrides: dict[str, bytes]) -> Header:
        name = overrides["path"].decode("utf-8", "surrogateescape") if "path" in overrides else info.name
        size = overrides.get("size", str(info.size).encode())
        # Not `issparse`: that asks for the map, which tarfile reads only when it opens the archive itself.
        sparse = info.type == tarfile.GNUTYPE_SPARSE or _SPARSE.decode() in overrides
        if not size.isdigit():
            raise self._broken("corrupt_shard", f"{name} has a size of {size!r}")
        if info.type == tarfile.GNUTYPE_SPARSE:
            self._skip_sparse_map(info)
        # Links, folders and devices have no bytes whatever their size says; unknown types have.
        has_bytes = info.isreg() or info.type not in tarfile.SUPPORTED_TYPES
        what = "sparse file" if sparse else _what(info)
        return Header(name.removeprefix("./"), self._at, int(size) if has_bytes else 0, what)

    def _skip_sparse_map(self, info: tarfile.TarInfo) -> None:
        extended = bool(info._sparse_structs[1])  # type: ignore[attr-defined]
        while extended:
            extended = bool(self._exactly(BLOCK)[504])

    def _exactly(self, size: int) -> bytes:
        data = self._read(size)
        if len(data) < size:
            raise self._broken("truncated_shard", f"ends at byte {self._at}, {size - len(data)} bytes too early")
        return data

    def _skip(self, size: int) -> None:
        while size > 0:
            size -= len(self._exactly(min(size, _CHUNK_BYTES)))

    def _read(self, size: int) -> bytes:
        """Up to size bytes, fewer only at the end of the stream."""
        try:
            data = self._stream.read(size) if size else b""
        except EOFError:
            data = b""
        except (zlib.error, gzip.BadGzipFile) as error:
            raise self._broken("corrupt_shard", f"gzip broken after byte {self._at}: {error}") from None
        self._at += len(data)
        return data

    def _broken(self, reason: str, detail: str) -> BrokenArchiveError:
        return BrokenArchiveError(Fault(reason, detail), self._inside)


def _what(info: tarfile.TarInfo) -> str:
    if info.issym() or info.islnk():
        return f"link to {info.linkname}"
    if info.isdir():
        return "folder"
    return "file" if info.isreg() else f"tar member of type {info.type!r}"
