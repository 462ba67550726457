"""Files of releases on this machine's disk: of a local store where they lie, of any other a copy under their sha256."""

from __future__ import annotations

import hashlib
import os
import uuid
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import faiss

from pipelines.errors import IndexBuildError, StorageError
from pipelines.index.release import IndexShard, SideFile, open_shard
from pipelines.storage import COPY_BYTES, Store

ATTEMPTS = 3


@dataclass(frozen=True)
class Cache:
    """A folder of copies, of at most `max_bytes` together; those that were asked for longest ago go first.

    Any number of processes may share one: a copy is checked against its sha256 as it comes, and has its name only
    when it is whole. Whoever has a copy open keeps it, whatever becomes of its name here or of the release.
    """

    folder: Path
    max_bytes: int

    def copy_of(self, store: Store, path: str, file: IndexShard | SideFile) -> Path | None:
        """Where a file of a release is on this machine; None where it is larger than the whole cache.

        Raises: FileNotFoundError; IndexBuildError where it is not what its manifest says, StorageError where there is
        no room.
        """
        if file.bytes > self.max_bytes:
            return None
        copy = self.folder / file.sha256
        if not _is_there(copy, file.bytes):
            self._fetch(store, path, file, copy)
            self._make_room(copy)
        with suppress(OSError):
            os.utime(copy)
        return copy

    def _fetch(self, store: Store, path: str, file: IndexShard | SideFile, copy: Path) -> None:
        temporary = self.folder / f".{file.sha256}.{uuid.uuid4().hex[:12]}.tmp"
        digest = hashlib.sha256()
        with store.open(path) as source:
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                with temporary.open("wb") as target:
                    while data := source.read(COPY_BYTES):
                        digest.update(data)
                        _write(target, data, self.folder)
                if digest.hexdigest() != file.sha256:
                    raise IndexBuildError(
                        f"{store.uri(path)} is not what its manifest says", "Index again with --force."
                    )
                temporary.replace(copy)
            except (PermissionError, NotADirectoryError, FileExistsError) as error:
                raise _no_room(self.folder, error) from None
            finally:
                with suppress(OSError):
                    temporary.unlink()

    def _make_room(self, newest: Path) -> None:
        """Temporary files of others are left alone; those of the dead take up no room that is counted."""
        used = sorted((stat.st_mtime_ns, stat.st_size, path) for path, stat in _stats(self.folder) if path != newest)
        total = newest.stat().st_size + sum(size for _, size, _ in used)
        for _, size, path in used:
            if total <= self.max_bytes:
                return
            with suppress(OSError):
                path.unlink()
            total -= size


def _write(target: Any, data: bytes, folder: Path) -> None:
    try:
        target.write(data)
    except OSError as error:
        raise _no_room(folder, error) from None


def _no_room(folder: Path, error: OSError) -> StorageError:
    return StorageError(f"The cache {folder} cannot be written: {error}", "Name another with --cache, or --cache none.")


def _is_there(copy: Path, size: int) -> bool:
    with suppress(OSError):
        return copy.stat().st_size == size
    return False


def _stats(folder: Path) -> list[tuple[Path, os.stat_result]]:
    found = []
    for path in folder.iterdir():
        with suppress(OSError):
            if not path.name.startswith("."):
                found.append((path, path.stat()))
    return found


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


def opened_shard(store: Store, folder: str, shard: IndexShard, key: str, cache: Cache | None = None) -> Any:
    """An index shard to search: mapped where it is on this machine's disks, else read into memory.

    What is mapped is read as searches touch it. Of a local file the size and the number of vectors are checked, of one
    that is fetched or read the sha256 too; `vecmill verify --deep` checks every file whole.
    Raises: IndexBuildError where it is gone or is not what the manifest says.
    """
    path = f"{folder}/{shard.file}"
    for left in reversed(range(ATTEMPTS)):
        try:
            local = on_disk(store, path, shard, cache)
            return _mapped(local, store.uri(path), shard, key) if local else open_shard(store, folder, shard)
        except FileNotFoundError:
            # Of a cache that others fill, a copy may go before it is opened.
            if not left or store.local_path(path):
                raise IndexBuildError(f"{store.uri(path)} is gone", "Index again with --force.") from None
    raise AssertionError


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
