"""A folder of images: captions in sibling `.txt` (one a line), metadata in `.json`, sub-folders as labels.

A shard is a slice of the folder: the files whose key (relative path without suffix) hashes to it.
"""

from __future__ import annotations

import hashlib
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from pipelines.config import ReadConfig
from pipelines.contracts import Entry, Sample, Shard
from pipelines.errors import ChangedInputError, InputError
from pipelines.secrets import without_credentials
from pipelines.sources.fetch import in_order
from pipelines.sources.identity import shard_id, slice_count, slice_of, slice_piece
from pipelines.sources.kinds import is_litter
from pipelines.sources.members import (
    MAX_METADATA_BYTES,
    Member,
    assemble,
    limit_of,
    too_large,
    without_repeats,
)
from pipelines.sources.places import ALLOWING, allowing, lies_in, place_of
from pipelines.sources.text import Fault, printable
from pipelines.storage import Store, is_local


@dataclass(frozen=True)
class File:
    """A file of the folder `root`: its path relative to it, key and lower-cased extension."""

    path: str
    key: str
    extension: str
    entry: Entry
    root: str


def plan(uri: str, settings: ReadConfig, store: Store, slices: dict[str, int]) -> list[Shard]:
    """One shard a slice, by the listing alone; the number of slices is looked up in `slices` or put there.

    Raises: InputError where the folder holds no files, or nothing but links that lead out of it.
    """
    files, name = _files(uri, store), without_credentials(uri)
    if not files:
        raise InputError(f"{uri} holds no files", "Name a folder with images in it.")
    if all(_leads_out(file, settings) for file in files):
        place = printable(place_of(files[0].entry.uri))
        raise InputError(
            f"The files of {uri} are links that lead out of it, to {place}",
            f"Name that folder, or allow it: {allowing(place, settings.allow)}",
        )
    if name not in slices:
        slices[name] = slice_count(len({file.key for file in files}), settings.samples_per_slice)
    count = slices[name]
    return [
        Shard(shard_id(uri, slice_piece((k, count))), uri, "folder", version, size, slice=(k, count))
        for k, (version, size) in enumerate(_versions(files, count))
    ]


def samples(shard: Shard, settings: ReadConfig, store: Store) -> Iterator[Sample]:
    """In the order of their keys. Raises: ChangedInputError where the slice is not what was planned, StorageError
    where a file may not be read or storage fails."""
    part, slices = shard.slice or (0, 1)
    files = [file for file in _files(shard.uri, store) if slice_of(file.key, slices) == part]
    if next(_versions(files, 1))[0] != shard.version:
        raise ChangedInputError(f"{shard.uri} has changed since the run was planned", "Run the same command again.")
    groups = _groups(files)
    yield from without_repeats(in_order(lambda group: _sample(group, settings, store), groups))


def _files(uri: str, store: Store) -> list[File]:
    """Everything in the folder, or that the pattern matches, but what desktops and tools leave there. Links to
    folders are not among it."""
    sign = None if store.is_folder(uri) else re.search(r"[*?\[]", uri)
    root = uri[: sign.start()].rpartition("/")[0] if sign else uri
    entries = store.glob(uri) if sign else store.entries(uri)
    return [file for entry in entries if (file := _file(entry, root)) is not None]


def _leads_out(file: File, settings: ReadConfig) -> bool:
    """Whether the file is a symbolic link to what is not in the folder and not allowed."""
    uri = file.entry.uri
    return is_local(uri) and Path(uri).is_symlink() and not lies_in(uri, (file.root, *settings.allow))


def _file(entry: Entry, root: str) -> File | None:
    path = entry.uri[len(root.rstrip("/")) + 1 :]
    if is_litter(path) or any(part.startswith(".") for part in path.split("/")):
        return None
    folder, slash, name = path.rpartition("/")
    stem, dot, extension = name.rpartition(".")
    key = f"{folder}{slash}{stem if dot else name}"
    return File(path, printable(key), extension.lower() if dot else "", entry, root)


def _versions(files: Iterable[File], slices: int) -> Iterator[tuple[str, int]]:
    """Version and bytes of each slice: a digest of its members' names, sizes and etags."""
    digests = [hashlib.sha256() for _ in range(slices)]
    sizes = [0] * slices
    for file in files:
        k = slice_of(file.key, slices)
        digests[k].update(printable(f"{file.path}\0{file.entry.bytes}\0{file.entry.etag}\n").encode())
        sizes[k] += file.entry.bytes
    for digest, size in zip(digests, sizes, strict=True):
        yield digest.hexdigest()[:12], size


def _groups(files: list[File]) -> Iterator[list[File]]:
    """The files of one key; a second image under it is a group of its own."""
    by_key: dict[str, list[File]] = defaultdict(list)
    for file in sorted(files, key=lambda file: file.path):
        by_key[file.key].append(file)
    for key in sorted(by_key):
        images = [file for file in by_key[key] if Member(file.extension).is_image]
        yield [file for file in by_key[key] if file not in images[1:]]
        yield from ([image] for image in images[1:])


def _sample(group: list[File], settings: ReadConfig, store: Store) -> Sample:
    members = [member for file in group for member in _members(file, settings, store)]
    sample = assemble(group[0].key, members, settings)
    main = next((file for file in group if Member(file.extension).is_image), group[0])
    folder, _, _ = main.path.partition("/") if "/" in main.path else ("", "", "")
    sample.metadata = {**sample.metadata, "path": printable(main.path)}
    sample.label = printable(folder) or sample.label
    sample.uri = sample.uri or printable(main.entry.uri)
    return sample


def _members(file: File, settings: ReadConfig, store: Store) -> list[Member]:
    """The file; one member a line for captions."""
    member = Member(file.extension, uri=printable(file.entry.uri), length=file.entry.bytes)
    is_caption = file.extension in ("txt", "caption")
    limit = MAX_METADATA_BYTES if is_caption else limit_of(member, settings)
    if _leads_out(file, settings):
        member.fault = Fault("forbidden_link", f"leads to {printable(place_of(file.entry.uri))}: {ALLOWING}")
    elif file.entry.bytes > limit:
        member.fault = too_large(member, limit)
    else:
        member.data = _read(file.entry, store)
    if not is_caption or member.data is None:
        return [member]
    lines = [line for line in member.data.splitlines() if line.strip()]
    return [Member(file.extension, line) for line in lines or [b""]]


def _read(entry: Entry, store: Store) -> bytes:
    changed = ChangedInputError(f"{entry.uri} changed while it was read", "Run the same command again.")
    try:
        data = store.read(entry.uri, lambda data: len(data) == entry.bytes, listed=True)
    except FileNotFoundError:
        raise changed from None
    if len(data) != entry.bytes:
        raise changed
    return data
