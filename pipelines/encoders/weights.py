"""Where a model's files lie: a local folder, object storage, or the model hub. Digests of them, and their way here.

A digest is the sha256 of what is in the weight files, so that a hub's model and a local copy of it are
the same; of objects in storage it is taken from size and etag, so that planning downloads no weights.
Objects in storage are fetched once per node.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

from filelock import FileLock

from pipelines.contracts import Entry
from pipelines.encoders.digest import combined, file_digest, sha256
from pipelines.encoders.hub import hub_folder
from pipelines.errors import ConfigError, EncoderError
from pipelines.storage import Store, is_local

_COPY_BYTES = 8 * 2**20
_SMALL = (".json", ".txt", ".model")


def default_cache() -> Path:
    """The node's own folder for fetched weights and digests of files."""
    return Path.home() / ".cache" / "vecmill"


class Folder(Protocol):
    """A model's files, by name, wherever they lie."""

    @property
    def reference(self) -> str:
        """Leads to the same files from any node: absolute, the hub's revision pinned."""
        ...

    def names(self) -> list[str]: ...

    def sub(self, name: str) -> Folder:
        """A folder in this one; it has no names where there is none."""
        ...

    def digest(self, names: Sequence[str]) -> str:
        """64 hex digits for what is in these files, without downloading weights."""
        ...

    def fetch(self, names: Sequence[str]) -> Path:
        """A local folder that holds these files, perhaps among others."""
        ...

    def fetched_digest(self, names: Sequence[str]) -> str:
        """`digest` once more, of what `fetch` gave."""
        ...


def small(names: Iterable[str]) -> list[str]:
    """Configurations and vocabularies: what planning reads."""
    return [name for name in names if name.endswith(_SMALL)]


def fetch_verified(folder: Folder, names: Sequence[str], weights: Sequence[str], digest: str) -> Path:
    """`fetch`, refused where the weights are no longer those of `digest`. Raises: EncoderError."""
    path = folder.fetch(names)
    refuse_changed(folder.reference, digest, folder.fetched_digest(weights))
    return path


def refuse_changed(reference: str, planned: str, found: str) -> None:
    """Raises: EncoderError where two digests of weights differ."""
    if found != planned:
        raise EncoderError(
            f"The weights of {reference} changed: planned with {planned[:12]}, found {found[:12]}.",
            "Put the old weights back, or start a new output (or --name) for the new ones.",
        )


@dataclass(frozen=True)
class LocalFolder:
    """Files on a disk that every node sees under the same path."""

    path: Path
    cache: Path = field(default_factory=default_cache)

    @property
    def reference(self) -> str:
        return str(self.path)

    def names(self) -> list[str]:
        return sorted(entry.name for entry in self.path.iterdir() if entry.is_file()) if self.path.is_dir() else []

    def sub(self, name: str) -> LocalFolder:
        return LocalFolder(self.path / name, self.cache)

    def digest(self, names: Sequence[str]) -> str:
        return combined(file_digest(self.fetch([name]) / name, self.cache) for name in names)

    def fetch(self, names: Sequence[str]) -> Path:
        for name in names:
            if not (self.path / name).is_file():
                raise EncoderError(f"{self.path / name} does not exist.", "Check the path; every node must see it.")
        return self.path

    fetched_digest = digest


@dataclass(frozen=True)
class RemoteFolder:
    """Objects below a URL. `only`: a single one of them, where the store cannot or need not list."""

    uri: str
    options: dict[str, dict[str, Any]] = field(default_factory=dict, hash=False)
    only: str | None = None
    cache: Path = field(default_factory=default_cache)

    @property
    def reference(self) -> str:
        return self.uri

    @property
    def _store(self) -> Store:
        return Store(options=self.options)

    @cached_property
    def _entries(self) -> dict[str, Entry]:
        return self._list()

    def _list(self) -> dict[str, Entry]:
        try:
            if self.only:
                return {self.only: self._store.stat(f"{self.uri}/{self.only}")}
            return {entry.uri.rpartition("/")[2]: entry for entry in self._store.glob(f"{self.uri}/*")}
        except FileNotFoundError as error:
            raise EncoderError(f"{error} does not exist.", "Check the weights' URL and its storage options.") from error

    def names(self) -> list[str]:
        return sorted(self._entries)

    def sub(self, name: str) -> RemoteFolder:
        return RemoteFolder(f"{self.uri}/{name}", self.options, cache=self.cache)

    def digest(self, names: Sequence[str]) -> str:
        return combined(_token(self._entry(name)) for name in names)

    def fetched_digest(self, names: Sequence[str]) -> str:
        return self.digest(names)  # each object was compared with its entry when it was fetched

    def _entry(self, name: str) -> Entry:
        if name not in self._entries:
            raise EncoderError(f"{self.uri}/{name} does not exist.", f"There: {', '.join(self.names()) or 'nothing'}.")
        return self._entries[name]

    def fetch(self, names: Sequence[str]) -> Path:
        target = self.cache / "weights" / self._folder_name()
        if all((target / name).is_file() for name in names):
            return target
        target.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{target}.lock"):
            for name in names:
                if not (target / name).is_file():
                    self._download(self._entry(name), target / name)
        return target

    def _folder_name(self) -> str:
        version = combined(f"{name}:{_token(entry)}" for name, entry in sorted(self._entries.items()))
        slug = re.sub(r"[^A-Za-z0-9.-]+", "_", self.uri)[-60:]
        return f"{slug}-{sha256(self.uri)[:12]}-{version[:12]}"

    def _download(self, entry: Entry, path: Path) -> None:
        """Whole under its name, or not at all: another process may look without the lock."""
        partial = path.with_name(f"{path.name}.partial")
        with self._store.open(entry.uri) as source, partial.open("wb") as target:
            shutil.copyfileobj(source, target, _COPY_BYTES)
        now = self._store.stat(entry.uri)
        if partial.stat().st_size != entry.bytes or _token(now) != _token(entry):
            raise EncoderError(f"{entry.uri} changed while it was fetched.", "Run the same command again.")
        partial.replace(path)


def folder(reference: str, options: dict[str, dict[str, Any]], cache: Path | None = None) -> Folder:
    """Of a local path, a URL, or a hub name with `@revision` after it. Raises: EncoderError."""
    cache = cache or default_cache()
    if "://" in reference and not is_local(reference):
        return RemoteFolder(reference.rstrip("/"), options, cache=cache)
    path = Path(re.sub(r"^(file|local)://", "", reference)).expanduser().absolute()
    if path.is_dir():
        return LocalFolder(path, cache)
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?(@[\w./-]+)?", reference) or reference.startswith("."):
        raise ConfigError(f"{reference} is no folder here.", "Name a folder, a URL (s3://…) or a model of the hub.")
    name, _, revision = reference.partition("@")
    return hub_folder(name, revision or None, cache)


def containing(file: str, options: dict[str, dict[str, Any]]) -> tuple[Folder, str]:
    """The folder of a single file, a path or a URL, and the file's name there.

    Raises: EncoderError where a path leads nowhere.
    """
    parent, _, name = file.rpartition("/")
    if "://" in file and not is_local(file):
        return RemoteFolder(parent, options, only=name), name
    path = Path(re.sub(r"^(file|local)://", "", file)).expanduser().absolute()
    folder = LocalFolder(path.parent)
    folder.fetch([path.name])
    return folder, path.name


def _token(entry: Entry) -> str:
    return sha256(f"{entry.bytes}:{entry.etag}")
