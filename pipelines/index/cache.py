"""Files of releases on this machine's disk: of a local store where they lie, of any other a copy under their sha256."""

from __future__ import annotations

import hashlib
import os
import re
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import faiss

from pipelines.errors import IndexBuildError, StorageError
from pipelines.index.files import gone, open_shard
from pipelines.index.manifest import IndexShard, SideFile
from pipelines.local_disk import COPY_BYTES
from pipelines.storage import Store

ATTEMPTS = 3
ABANDONED_AFTER_S = 24 * 3600.0
T = TypeVar("T")
_COPY = re.compile(r"[0-9a-f]{64}")
_TEMPORARY = re.compile(r"\.[0-9a-f]{64}\.[0-9a-f]{12}\.tmp")


class UnwritableError(StorageError):
    """A cache whose folder cannot be made or written."""


@dataclass(frozen=True)
class Cache:
    """A folder of copies, of at most `max_bytes` together; those that were asked for longest ago go first.

    Any number of processes may share one: a copy is checked against its sha256 as it comes, and has its name only
    when it is whole. Whoever has a copy open keeps it, whatever becomes of its name here or of the release. Files of
    any other name are not the cache's: they are neither counted nor deleted. optional: where the folder cannot be
    written, files are read where they are.
    """

    folder: Path
    max_bytes: int
    optional: bool = False

    def copy_of(self, store: Store, path: str, file: IndexShard | SideFile) -> Path | None:
        """Where a file of a release is on this machine; None where it cannot be, or is larger than the whole cache.

        Raises: FileNotFoundError; IndexBuildError where it is not what its manifest says, UnwritableError.
        """
        if file.bytes > self.max_bytes:
            return None
        copy = self.folder / file.sha256
        if not _is_there(copy, file.bytes):
            try:
                self._fetch(store, path, file, copy)
            except UnwritableError:
                if self.optional:
                    return None
                raise
            self._make_room(copy)
        with suppress(OSError):
            os.utime(copy)
        return copy

    def _fetch(self, store: Store, path: str, file: IndexShard | SideFile, copy: Path) -> None:
        temporary = self.folder / f".{file.sha256}.{uuid.uuid4().hex[:12]}.tmp"
        digest = hashlib.sha256()
        with store.open(path) as source:
            try:
                with self._writing():
                    self.folder.mkdir(parents=True, exist_ok=True)
                    target = temporary.open("wb", buffering=0)
                with target:
                    while data := source.read(COPY_BYTES):
                        digest.update(data)
                        with self._writing():
                            _write_all(target, data)
                if digest.hexdigest() != file.sha256:
                    raise IndexBuildError(
                        f"{store.uri(path)} is not what its manifest says", "Index again with --force."
                    )
                with self._writing():
                    temporary.replace(copy)
            finally:
                with suppress(OSError):
                    temporary.unlink()

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise UnwritableError(
                f"The cache {self.folder} cannot be written: {error}", "Name another with --cache, or --cache none."
            ) from None

    def _make_room(self, newest: Path) -> None:
        """Temporary files of others are left alone until nobody can be at work on them any more."""
        _clear_abandoned(self.folder)
        others = [each for each in _stats(self.folder, _COPY) if each[0] != newest]
        used = sorted((stat.st_mtime_ns, stat.st_size, path) for path, stat in others)
        total = newest.stat().st_size + sum(size for _, size, _ in used)
        for _, size, path in used:
            if total <= self.max_bytes:
                return
            with suppress(OSError):
                path.unlink()
            total -= size


def _write_all(target: Any, data: bytes) -> None:
    left = memoryview(data)
    while left:
        left = left[target.write(left) :]


def _is_there(copy: Path, size: int) -> bool:
    with suppress(OSError):
        return copy.stat().st_size == size
    return False


def _stats(folder: Path, name: re.Pattern[str]) -> list[tuple[Path, os.stat_result]]:
    found = []
    for path in folder.iterdir():
        with suppress(OSError):
            if name.fullmatch(path.name):
                found.append((path, path.stat()))
    return found


def _clear_abandoned(folder: Path) -> None:
    for path, stat in _stats(folder, _TEMPORARY):
        with suppress(OSError):
            if time.time() - stat.st_mtime > ABANDONED_AFTER_S:
                path.unlink()


def on_disk(store: Store, path: str, file: IndexShard | SideFile, cache: Cache | None) -> Path | None:
    """A file of a release on this machine's disks, fetched first where need be; None where it is to be read remotely.

    Raises: FileNotFoundError, IndexBuildError where it is not of its size.
    """
    local = store.local_path(path)
    if local is None:
        return cache.copy_of(store, path, file) if cache else None
    if local.stat().st_size != file.bytes:
        raise IndexBuildError(f"{store.uri(path)} is not what its manifest says", "Index again with --force.")
    return local


def used_on_disk(
    store: Store, path: str, file: IndexShard | SideFile, cache: Cache | None, use: Callable[[Path | None], T]
) -> T:
    """What `use` makes of `on_disk`: again, where of a cache that others fill a copy goes before it is opened.

    Raises: as `on_disk`.
    """
    for _ in range(ATTEMPTS - 1):
        with suppress(FileNotFoundError):
            return use(on_disk(store, path, file, cache))
    return use(on_disk(store, path, file, cache))


def opened_shard(store: Store, folder: str, shard: IndexShard, key: str, cache: Cache | None = None) -> Any:
    """An index shard to search: mapped where it is on this machine's disks, else read into memory.

    What is mapped is read as searches touch it. Of a local file the size and the number of vectors are checked, of one
    that is fetched or read the sha256 too; `vecmill verify --deep` checks every file whole.
    Raises: IndexBuildError where it is gone or is not what the manifest says.
    """
    path = f"{folder}/{shard.file}"

    def opened(local: Path | None) -> Any:
        return _mapped(local, store.uri(path), shard, key) if local else open_shard(store, folder, shard)

    try:
        return used_on_disk(store, path, shard, cache, opened)
    except FileNotFoundError:
        raise gone(store, path) from None


def _mapped(local: Path, uri: str, shard: IndexShard, key: str) -> Any:
    """Inverted lists are mapped by one flag of FAISS, all other codes and graphs by another."""
    flag = faiss.IO_FLAG_MMAP if "IVF" in key else faiss.IO_FLAG_MMAP_IFC
    if not local.exists():
        raise FileNotFoundError(local)
    try:
        index = faiss.read_index(str(local), flag)
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[-1]
        raise IndexBuildError(f"{uri} is not a whole FAISS index: {reason}", "Index again with --force.") from None
    if index.ntotal != shard.rows:
        raise IndexBuildError(f"{uri} is not what its manifest says", "Index again with --force.")
    return index
