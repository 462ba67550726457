"""A seekable stream over an object in storage that survives broken connections."""

from __future__ import annotations

import errno
import io
import os
from collections.abc import Callable
from typing import Any

from pipelines.errors import StorageError
from pipelines.retry import retrying

READ_BLOCK_BYTES = 8 * 2**20


def resuming(open_object: Callable[[int], Any], uri: str, listed: bool = False) -> io.BufferedReader:
    """open_object: fsspec's, given a block size that may be 0. uri: for messages. listed: it is known to be there."""
    return io.BufferedReader(_ResumingStream(open_object, uri, listed), READ_BLOCK_BYTES)


class _ResumingStream(io.RawIOBase):
    """Reads an object; a fault that passes, or an end before its size, reopens it at the same position."""

    def __init__(self, open_object: Callable[[int], Any], uri: str, listed: bool) -> None:
        self._open_object, self._uri, self._listed = open_object, uri, listed
        self._at, self._block_bytes = 0, READ_BLOCK_BYTES
        self._file: Any = None
        self._reopen()

    def _reopen(self) -> None:
        def open_here() -> Any:
            file = self._open_object(self._block_bytes)
            _go_to(file, self._at)
            return file

        self._file = retrying(open_here, f"Cannot open {self._uri}", self._listed)

    def readinto(self, buffer: Any) -> int:
        def read() -> bytes:
            try:
                return self._whole(bytes(self._file.read(len(buffer))))
            except ValueError:
                # A web server that knows no ranges, as shows only past the first block: streamed from here on.
                self._block_bytes = 0
                self._reopen()
                return bytes(self._file.read(len(buffer)))
            except Exception:
                self._reopen()
                raise

        data = retrying(read, f"Cannot read {self._uri} at byte {self._at}", self._listed)
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)

    def _whole(self, data: bytes) -> bytes:
        """A server or a proxy on the way may end a body early and say that this was all."""
        size = getattr(self._file, "size", None)
        if not data and isinstance(size, int) and self._at < size:
            raise OSError(errno.EIO, f"the object ends at byte {self._at} of {size}")
        return data

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return bool(self._file.seekable())

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        try:
            self._at = int(self._file.seek(offset, whence))
        except ValueError as error:
            what = f"Cannot seek in {self._uri}: {error}"
            raise StorageError(what, "Copy it to storage that answers range requests.") from error
        return self._at

    def tell(self) -> int:
        return self._at

    def close(self) -> None:
        if not self.closed and self._file is not None:
            self._file.close()
        super().close()


def _go_to(file: Any, position: int) -> None:
    """Of a freshly opened file. A web server that knows no ranges is read up to the position again."""
    try:
        file.seek(position)
    except ValueError:
        while position:
            skipped = len(file.read(min(position, READ_BLOCK_BYTES)))
            if not skipped:
                raise OSError(f"the object ends {position} bytes early") from None
            position -= skipped
