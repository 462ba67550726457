"""fsspec in and out: open, list, put_atomic, put_if_absent. The only file that knows s3 from local.

Everything here may be called again after a crash or a lost acknowledgement: a put is whole or
absent, `put_if_absent` has one winner, and a read that breaks off is taken up where it stopped.
"""

from __future__ import annotations

import errno
import io
import json
import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import fsspec
from fsspec.utils import get_protocol

from pipelines import local_disk
from pipelines.contracts import Entry
from pipelines.errors import InputError
from pipelines.listed import etag_of, files, plain, whole_walk
from pipelines.retry import retrying
from pipelines.secrets import remember
from pipelines.stream import resuming
from pipelines.uploads import Upload, begun

LIST_THREADS = 32
SAME_ANSWERS = 3


def protocol_of(uri: str) -> str:
    return str(get_protocol(uri))


def whole_uri(uri: str) -> str:
    """The one spelling of an object's address that listings use too; local paths become absolute.

    Raises: ValueError or ImportError for a protocol that is unknown or not installed.
    """
    kind = fsspec.get_filesystem_class(protocol_of(uri))
    bare = str(kind._strip_protocol(uri))
    names = (kind.protocol,) if isinstance(kind.protocol, str) else kind.protocol
    if is_local(uri) or any(bare.startswith(f"{name}://") for name in names):
        return bare
    return f"{names[0]}://{bare}"


def is_local(uri: str) -> bool:
    return protocol_of(uri) in ("file", "local")


@dataclass(frozen=True)
class Store:
    """A folder in any storage fsspec opens; paths are relative to it (or whole, with root "").

    options: keyword arguments of the file system by protocol, as in
        `{"s3": {"endpoint_url": "http://localhost:9000"}}`. Pickles without its connections.
    """

    root: str = ""
    options: dict[str, dict[str, Any]] = field(default_factory=dict, hash=False, repr=False)

    def uri(self, path: str = "") -> str:
        return f"{self.root.rstrip('/')}/{path}".rstrip("/") if self.root else path

    def _fs(self, path: str) -> tuple[Any, str]:
        uri = self.uri(path)
        protocol = get_protocol(uri)
        remember(self.options)
        defaults: dict[str, Any] = {"auto_mkdir": True} if protocol in ("file", "local") else {}
        if protocol not in ("file", "local", "memory"):
            defaults["use_listings_cache"] = False
        fs, bare = fsspec.core.url_to_fs(uri, **{**defaults, **self.options.get(protocol, {})})
        if protocol in ("s3", "s3a"):
            # botocore and we try again already; a third layer would try a silent store for an hour.
            fs.retries = 1
        return fs, bare

    # -- reading ---------------------------------------------------------------------------------

    def read(self, path: str, is_whole: Callable[[bytes], bool] = lambda data: True, listed: bool = False) -> bytes:
        """The whole object. is_whole: where it says no, the object is read again, until it comes the same thrice.
        listed: it is known to be there, so that a store which says that it is not is asked again.

        Raises: FileNotFoundError.
        """
        fs, bare = self._fs(path)
        seen: Counter[bytes] = Counter()

        def cat() -> bytes:
            data = bytes(fs.cat_file(bare))
            if not is_whole(data):
                seen[data] += 1
                if seen[data] < SAME_ANSWERS:
                    raise OSError(errno.EIO, f"{len(data)} bytes came that are not what was put there")
            return data

        return retrying(cat, f"Cannot read {self.uri(path)}", listed)

    def read_listed(
        self, paths: Iterable[str], is_whole: Callable[[bytes], bool] = lambda data: True
    ) -> Iterator[bytes | None]:
        """Many small objects at once that were listed a moment ago, in order; None for one that has gone since."""
        with ThreadPoolExecutor(LIST_THREADS) as pool:
            yield from pool.map(lambda path: self._read_or_none(path, is_whole), paths)

    def _read_or_none(self, path: str, is_whole: Callable[[bytes], bool]) -> bytes | None:
        try:
            return self.read(path, is_whole, listed=True)
        except FileNotFoundError:
            return None

    def read_ranges(self, path: str, ranges: Sequence[tuple[int, int]]) -> list[bytes]:
        """The bytes of an object from start to stop, for each (start, stop), at once where the store can.

        Raises: FileNotFoundError.
        """
        fs, bare = self._fs(path)
        starts, stops = [start for start, _ in ranges], [stop for _, stop in ranges]

        def cat() -> list[bytes]:
            found = [bytes(data) for data in fs.cat_ranges([bare] * len(ranges), starts, stops, on_error="raise")]
            if [len(data) for data in found] != [stop - start for start, stop in ranges]:
                raise OSError(errno.EIO, "less came than was asked for")
            return found

        return retrying(cat, f"Cannot read {self.uri(path)}")

    def local_path(self, path: str) -> Path | None:
        """Where the object is on this machine's disks; None where it is elsewhere."""
        return Path(self._fs(path)[1]) if is_local(self.uri(path)) else None

    def open(self, path: str, listed: bool = False) -> io.BufferedReader:
        """A seekable stream that resumes where a broken connection left it. listed: as for `read`."""
        fs, bare = self._fs(path)
        return resuming(lambda block_bytes: fs.open(bare, "rb", block_size=block_bytes), self.uri(path), listed)

    def stat(self, path: str, listed: bool = False) -> Entry:
        """listed: as for `read`. Raises FileNotFoundError."""
        fs, bare = self._fs(path)
        info = retrying(lambda: fs.info(bare), f"Cannot look up {self.uri(path)}", listed)
        return Entry(self.uri(path), int(info.get("size") or 0), etag_of(info))

    def exists(self, path: str) -> bool:
        try:
            self.stat(path)
        except FileNotFoundError:
            return False
        return True

    def names(self, path: str) -> list[str]:
        """Names, relative to `path`, of every object below it; empty where there is none."""
        fs, bare = self._fs(path)
        start = len(bare.rstrip("/")) + 1

        def find() -> list[str]:
            try:
                return [str(name)[start:] for name in fs.find(bare, **whole_walk(fs))]
            except (FileNotFoundError, NotADirectoryError):
                return []

        return retrying(find, f"Cannot list {self.uri(path)}")

    def entries(self, path: str) -> list[Entry]:
        """Every object below `path` with its size and etag, sorted by name."""
        fs, bare = self._fs(path)

        def find() -> list[Entry]:
            try:
                return files(fs, fs.find(bare, detail=True, **whole_walk(fs)).values())
            except (FileNotFoundError, NotADirectoryError):
                return []

        return retrying(find, f"Cannot list {self.uri(path)}")

    def sizes(self, path: str) -> Iterator[tuple[str, int]]:
        """Path, relative to the store, and bytes of every object below `path`, sorted by name."""
        start = len(whole_uri(self.uri(path)).rstrip("/")) + 1
        return ((f"{path}/{entry.uri[start:]}", entry.bytes) for entry in self.entries(path))

    def glob(self, pattern: str) -> list[Entry]:
        """Objects that match a pattern of `*`, `?`, `[…]` and `**`, sorted by name."""
        fs, bare = self._fs(pattern)

        def find() -> list[Entry]:
            return files(fs, fs.glob(bare, detail=True, **whole_walk(fs)).values())

        return retrying(find, f"Cannot list {self.uri(pattern)}")

    def _children(self, folder: str) -> list[Entry]:
        """Objects right in a folder. Its name is no pattern, whatever signs are in it."""
        fs, bare = self._fs(folder)

        def list_folder() -> list[Entry]:
            try:
                return files(fs, fs.ls(bare, detail=True))
            except (FileNotFoundError, NotADirectoryError):
                return []

        return retrying(list_folder, f"Cannot list {self.uri(folder)}")

    def is_folder(self, path: str) -> bool:
        fs, bare = self._fs(path)
        return bool(retrying(lambda: fs.isdir(bare), f"Cannot look up {self.uri(path)}"))

    def stat_many(self, uris: list[str]) -> list[Entry]:
        """Sizes and etags of many objects, by one listing for each folder where that is cheaper.

        Raises: InputError naming the first few that are missing.
        """
        folders: dict[str, list[str]] = {}
        for uri in uris:
            folders.setdefault(uri.rpartition("/")[0], []).append(uri)
        known: dict[str, Entry] = {}
        with ThreadPoolExecutor(LIST_THREADS) as pool:
            for folder, members in folders.items():
                if len(members) > LIST_THREADS and get_protocol(folder) not in ("http", "https"):
                    known |= {plain(entry.uri): entry for entry in self._children(folder)}
                else:
                    for uri, found in zip(members, pool.map(self._stat_or_none, members), strict=True):
                        if found is not None:
                            known[plain(uri)] = found
        missing = [uri for uri in uris if plain(uri) not in known]
        if missing:
            raise InputError(
                f"{len(missing)} of {len(uris)} input objects do not exist: {', '.join(missing[:3])}",
                "Check the names (a brace range names every number in it), or use a glob.",
            )
        return [known[plain(uri)] for uri in uris]

    def _stat_or_none(self, uri: str) -> Entry | None:
        try:
            return self.stat(uri)
        except FileNotFoundError:
            return None

    # -- writing ---------------------------------------------------------------------------------

    def put_atomic(self, path: str, data: bytes | Path) -> None:
        """Bytes or a local file under its final name, whole or not at all; replaces what was there."""
        fs, bare = self._fs(path)
        if is_local(self.uri(path)):
            retrying(lambda: local_disk.put(bare, data, os.replace), f"Cannot write {self.uri(path)}")
        elif isinstance(data, bytes):
            retrying(lambda: fs.pipe_file(bare, data), f"Cannot write {self.uri(path)}")
        else:
            retrying(lambda: fs.put_file(str(data), bare), f"Cannot write {self.uri(path)}")

    def put_if_absent(self, path: str, data: bytes) -> bool:
        """True where this call created the object, False where one was there already.

        After a lost acknowledgement it may be ours and yet answer False: read it to know.
        """
        fs, bare = self._fs(path)

        def put() -> bool:
            try:
                if is_local(self.uri(path)):
                    local_disk.put(bare, data, os.link)
                else:
                    fs.pipe_file(bare, data, mode="create")
            except FileExistsError:
                return False
            except OSError as error:
                # Ceph's gateway answers a lost race with EINVAL.
                if error.errno == errno.EINVAL and fs.exists(bare):
                    return False
                raise
            return True

        return retrying(put, f"Cannot write {self.uri(path)}")

    def copy(self, source: str, target: str, listed: bool = False) -> None:
        """listed: as for `read`. Raises FileNotFoundError where the source is gone."""
        fs, bare_source = self._fs(source)
        _, bare_target = self._fs(target)
        what = f"Cannot copy {self.uri(source)} to {self.uri(target)}"
        if is_local(self.uri(target)):
            retrying(lambda: local_disk.put(bare_target, Path(bare_source), os.replace), what, listed)
        else:
            retrying(lambda: fs.cp_file(bare_source, bare_target), what, listed)

    def delete(self, paths: Iterable[str]) -> None:
        """Those that are already gone are no error."""
        for path in paths:
            fs, bare = self._fs(path)
            with suppress(FileNotFoundError):
                retrying(partial(fs.rm_file, bare), f"Cannot delete {self.uri(path)}")

    def uploads(self, folders: Iterable[str]) -> list[Upload]:
        """Objects in folders that were begun to be sent in pieces and have not come to their end, sorted by path.

        No listing tells of them, and their bytes are paid for. Empty where storage knows no such thing, or does not
        let one ask.
        """
        fs, bare = self._fs("")
        if protocol_of(self.root) not in ("s3", "s3a"):
            return []
        bucket, _, prefix = bare.partition("/")
        prefix = f"{prefix.rstrip('/')}/".lstrip("/")

        def list_all() -> list[tuple[str, int, str]]:
            return [each for folder in folders for each in begun(fs, bucket, f"{prefix}{folder}/")]

        try:
            found = retrying(list_all, f"Cannot list what was begun in {self.root}")
        except PermissionError:
            return []
        return sorted((Upload(key.removeprefix(prefix), size, id) for key, size, id in found), key=lambda it: it.path)

    def abort(self, uploads: Iterable[Upload]) -> None:
        """Those that are already gone are no error."""
        for upload in uploads:
            fs, bare = self._fs(upload.path)
            bucket, _, key = bare.partition("/")
            with suppress(FileNotFoundError):
                retrying(partial(fs.abort_mpu, bucket, key, upload.id), f"Cannot abort {self.uri(upload.path)}")

    def delete_folder(self, path: str) -> None:
        self.delete(f"{path}/{name}" for name in self.names(path))
        if is_local(self.uri(path)):
            shutil.rmtree(self._fs(path)[1], ignore_errors=True)


def is_whole_json(data: bytes) -> bool:
    """Of an object, not a list. What is cut short lacks its last brace, or has it too early and does not parse."""
    try:
        return isinstance(json.loads(data), dict)
    except ValueError:
        return False


def scratch_folder() -> tempfile.TemporaryDirectory[str]:
    """A folder on local disk for one piece of work, gone with its context."""
    return tempfile.TemporaryDirectory(prefix="vecmill-")
