"""A release's FAISS files: checked as they are read."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import IO, Any

import faiss

from pipelines.errors import IndexBuildError
from pipelines.index.manifest import IndexShard
from pipelines.storage import Store


def sha256_of(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


class _Checked:
    """Reads a stream on FAISS's behalf and keeps the checksum of what went by."""

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream, self.digest = stream, hashlib.sha256()

    def read(self, size: int) -> bytes:
        data = self._stream.read(size)
        self.digest.update(data)
        return data


def open_shard(store: Store, folder: str, shard: IndexShard) -> Any:
    """The FAISS index of one index shard, in memory; its ids are the release's.

    Raises: IndexBuildError where the file is gone or is not what the manifest says.
    """
    path = f"{folder}/{shard.file}"
    try:
        index, sha256 = load_index(store, path)
    except FileNotFoundError:
        raise gone(store, path) from None
    if (index.ntotal, sha256) != (shard.rows, shard.sha256):
        raise IndexBuildError(f"{store.uri(path)} is not what its manifest says", "Index again with --force.")
    return index


def gone(store: Store, path: str) -> IndexBuildError:
    """What is told of a file of a release that is not there when it is opened or read."""
    return IndexBuildError(
        f"{store.uri(path)} is gone: its release was deleted meanwhile, or the file alone",
        "Search again, in the current release. If it says so of that too, index again with --force.",
    )


def load_index(store: Store, path: str) -> tuple[Any, str]:
    """Any FAISS file in the store, as an index in memory, and its sha256. Raises: FileNotFoundError."""
    with store.open(path) as stream:
        checked = _Checked(stream)
        try:
            index = faiss.read_index(faiss.PyCallbackIOReader(checked.read))
        except RuntimeError as error:
            reason = str(error).strip().splitlines()[-1]
            fix = "Index again with --force."
            raise IndexBuildError(f"{store.uri(path)} is not a whole FAISS index: {reason}", fix) from None
        while checked.read(2**20):
            pass
        return index, checked.digest.hexdigest()
