"""WebDataset tars, as img2dataset and webdataset write them: files that share a key are one sample.

The key is the path up to the first dot of the file's name, the extension what follows it
(github.com/webdataset/webdataset). A shard is one tar, gzipped or not.
"""

from __future__ import annotations

import gzip
from collections.abc import Iterator
from io import BufferedReader
from typing import BinaryIO, cast

from pipelines.config import ReadConfig
from pipelines.contracts import Entry, Sample, Shard
from pipelines.errors import StorageError
from pipelines.sources.archive import Archive, BrokenArchiveError, Header
from pipelines.sources.identity import object_version, shard_id
from pipelines.sources.kinds import basename, is_litter
from pipelines.sources.members import (
    MAX_MEMBERS,
    Member,
    assemble,
    limit_of,
    reject_all,
    rejected_row,
    split_images,
    too_large,
    without_repeats,
)
from pipelines.sources.text import Fault, printable
from pipelines.storage import Store


def plan(entries: list[Entry]) -> list[Shard]:
    return [Shard(shard_id(e.uri), e.uri, "tar", object_version(e), e.bytes) for e in entries]


def samples(shard: Shard, settings: ReadConfig, store: Store) -> Iterator[Sample]:
    """In the order of the archive. Where it breaks, the sample that was cut is rejected, or a row of its own
    stands for what is missing.

    Raises: StorageError where fewer bytes came than were listed, so that the shard is read again.
    """
    with store.open(shard.uri, listed=True) as stream:
        for sample in without_repeats(_samples(shard, settings, stream)):
            _require_whole(shard, stream, sample)
            yield sample


def _samples(shard: Shard, settings: ReadConfig, stream: BufferedReader) -> Iterator[Sample]:
    archive = Archive(_unpacked(stream))
    members: list[Member] = []
    key = ""
    try:
        for header in archive.headers():
            if is_litter(header.name):
                continue
            next_key, extension = split_name(header.name)
            ends = next_key != key or any(m.extension == extension for m in members) or len(members) == MAX_MEMBERS
            if members and ends:
                yield from _assembled(key, members, settings)
                members = []
            key = next_key
            _add(members, header, Member(extension, uri=shard.uri), archive, settings)
    except BrokenArchiveError as broken:
        yield from _broken_off(shard, key, members, broken, settings)
    else:
        if members:
            yield from _assembled(key, members, settings)


def _assembled(key: str, members: list[Member], settings: ReadConfig) -> Iterator[Sample]:
    for part in split_images(members):
        yield assemble(key, part, settings)


def _broken_off(
    shard: Shard, key: str, members: list[Member], broken: BrokenArchiveError, settings: ReadConfig
) -> Iterator[Sample]:
    """Inside a file, its sample is incomplete; between files, none is known to be."""
    if broken.inside and members:
        members[-1].fault = broken.fault
        cut = reject_all(assemble(key, members, settings), broken.fault)
        yield cut
        if any(reject.reason == broken.fault.reason for reject in cut.rejects):
            return  # else every item of it was rejected for faults of its own, and nothing would tell of the break
    elif members:
        yield from _assembled(key, members, settings)
    yield rejected_row(f"{basename(shard.uri)}#end", shard.uri, broken.fault)


def _add(members: list[Member], header: Header, member: Member, archive: Archive, settings: ReadConfig) -> None:
    member.offset, member.length = header.offset, header.size
    limit = limit_of(member, settings, members)
    wanted = not (member.is_image and any(m.is_plain_image or not member.is_plain_image for m in members if m.is_image))
    # In the list before it is read: if the archive breaks off there, this is the sample that was cut.
    members.append(member)
    if header.what != "file":
        member.fault = Fault("not_a_file", printable(f"{header.name} is a {header.what}"))
    elif header.size > limit:
        member.fault = too_large(member, limit)
    elif wanted:
        member.data = archive.read(header)
    else:
        member.fault = Fault("duplicate_key", printable(f"{header.name} is a second image under this key"))


def _require_whole(shard: Shard, stream: BufferedReader, sample: Sample) -> None:
    cut = any(reject.reason in ("truncated_shard", "corrupt_shard") for reject in sample.rejects)
    if cut and not stream.read(1) and stream.tell() < shard.bytes:
        raise StorageError(
            f"{shard.uri} broke off at byte {stream.tell()} of {shard.bytes}",
            "The network, not the file: run the same command again.",
        )


def _unpacked(stream: BufferedReader) -> BinaryIO:
    """By the first bytes, not the name: servers and users rename."""
    packed = stream.peek(2)[:2] == b"\x1f\x8b"
    return cast(BinaryIO, gzip.GzipFile(fileobj=stream) if packed else stream)


def split_name(name: str) -> tuple[str, str]:
    """Key and lower-cased extension; the dot of a hidden file belongs to the key."""
    folder, slash, file = name.rpartition("/")
    hidden = "." if file.startswith(".") else ""
    stem, _, extension = file[len(hidden) :].partition(".")
    return f"{folder}{slash}{hidden}{stem}", extension.lower()
