"""Takedowns: the samples that are removed from an output for ever, as tombstones under `removed/`.

A request is one immutable object with a tombstone a sample. It keeps no key, caption or hash of an image as such,
but marks of them: BLAKE2b keyed with the output's own salt (https://www.rfc-editor.org/rfc/rfc7693). Marks recognise
a sample where its input has changed, and tell nobody what it was; who can read the output can still confirm a guess.
"""

from __future__ import annotations

import io
import json
import uuid
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from datetime import UTC, datetime
from functools import lru_cache
from hashlib import blake2b

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray
from pydantic import BaseModel

from pipelines.contracts import Shard
from pipelines.errors import LedgerError
from pipelines.ledger import cut_of, object_of
from pipelines.storage import Store

FOLDER = "removed"
SALT = f"{FOLDER}/salt"
MARK_BYTES = 16
_SUFFIX, _COMPACTED = ".parquet", ".compacted.json"
_ABOUT = b"vecmill"
_NO_ARRAYS = ("marks", "requests")

TOMBSTONE = pa.schema(
    [
        pa.field("shard", pa.string(), nullable=False),
        pa.field("version", pa.string(), nullable=False),
        pa.field("row", pa.int64(), nullable=False),
        pa.field("key", pa.binary(MARK_BYTES), nullable=False),
        pa.field("key_lasts", pa.bool_(), nullable=False),
        pa.field("content", pa.binary(MARK_BYTES)),
    ]
)
"""key, content: marks. key_lasts: false where the key is but the row's number in its file. content: of the image;
of the captions where there is no image."""


class Request(BaseModel):
    """Who asked for a takedown, when and why; `samples` tombstones of it are its own."""

    id: str
    made: str
    by: str
    reason: str
    samples: int


@dataclass(frozen=True)
class Marks:
    """16 bytes that stand for a key or content, the same for the same in one output."""

    salt: bytes

    def key(self, key: str) -> bytes:
        return self._mark(b"key", key)

    def content(self, sha256: str | None, captions: Sequence[str | None] | None) -> bytes | None:
        """sha256: of the image. None where there is neither image nor caption."""
        if sha256:
            return self._mark(b"image", sha256)
        return self._mark(b"captions", json.dumps(list(captions))) if captions and any(captions) else None

    def _mark(self, kind: bytes, text: str) -> bytes:
        data = text.encode("utf-8", "surrogatepass")
        return blake2b(data, digest_size=MARK_BYTES, key=self.salt, person=kind).digest()


def _number(mark: bytes | None) -> int:
    """The first half of a mark, 0 for none: two of a trillion marks agree with a chance of one in ten thousand or so
    where only this half is compared, so that no rule goes by one alone but within one input object."""
    return int.from_bytes(mark[:8]) if mark else 0


def _numbers(marks: pa.ChunkedArray) -> NDArray[np.uint64]:
    return np.array([_number(mark) for mark in marks.to_pylist()], np.uint64)


def _places(names: Iterable[str]) -> NDArray[np.uint64]:
    return np.array([_place(name) for name in names], np.uint64)


def _place(name: str) -> int:
    return int.from_bytes(blake2b(name.encode(), digest_size=8).digest())


@dataclass(frozen=True)
class OfShard:
    """What decides for one shard's version. rows: removed for sure, by their number. keys, contents: of tombstones of
    what the same input object held before it changed, or was cut otherwise. others: of all tombstones."""

    rows: frozenset[int]
    keys: frozenset[int]
    contents: frozenset[int]
    others: Takedowns

    def catches(self, row: int, key: str, content: Callable[[Marks], bytes | None]) -> bool:
        """Whether a sample is removed. content: its mark, which takes a while; asked for only if it can matter.

        By its row; where its object has changed, by its key or its content; anywhere else by both together, since
        keys are often but numbers, and one picture may stand in for many images that are missing.
        """
        if row in self.rows:
            return True
        if not len(self.others):
            return False
        marked = _number(self.others.marks.key(key))
        if marked in self.keys:
            return True
        elsewhere = self.others.contents_of(marked)
        if not self.contents and not len(elsewhere):
            return False
        number = _number(content(self.others.marks))
        return number != 0 and (number in self.contents or bool((elsewhere == number).any()))

    def masked(self, rows: pa.Table) -> pa.Table:
        """Rows (columns row, key, sha256, captions) with the key null where the sample is removed."""
        if not len(self.others):
            return rows
        columns = [rows[name].to_pylist() for name in ("row", "key", "sha256", "captions")]
        gone = [
            key is not None and self.catches(row, key, lambda marks, of=(sha256, captions): marks.content(*of))  # type: ignore[misc]
            for row, key, sha256, captions in zip(*columns, strict=True)
        ]
        if not any(gone):
            return rows
        keys = pc.if_else(pa.array(gone), pa.scalar(None, rows["key"].type), rows["key"])
        return rows.set_column(rows.schema.get_field_index("key"), "key", keys)


@dataclass(frozen=True)
class Touched:
    """The shards' versions, or objects, that have tombstones."""

    places: frozenset[int]

    def __contains__(self, name: str) -> bool:
        """name: `shard.version`, or of an object."""
        return bool(self.places) and _place(name) in self.places

    def __len__(self) -> int:
        return len(self.places)

    def among(self, places: NDArray[np.uint64]) -> NDArray[np.bool_]:
        return np.isin(places, np.array(sorted(self.places), np.uint64))


UNTOUCHED = Touched(frozenset())


@dataclass(frozen=True)
class Suspects:
    """Shards that may once have held what was taken down: of these `shards`, or of an object with tombstones of other
    `cuts` than theirs."""

    shards: frozenset[int]
    cuts: Mapping[int, set[int]]

    def __contains__(self, shard: str) -> bool:
        if _place(shard) in self.shards:
            return True
        return bool(self.cuts.get(_place(object_of(shard)), set()) - {_place(cut_of(shard))})


@dataclass(frozen=True, eq=False)
class Takedowns:
    """All tombstones of an output, 66 bytes each in memory, in order of their keys' marks.

    places, objects, cuts, shards: uint64, of shard and version, of the shard's object, of its cut, and of the shard.
    rows: int64.
    keys, contents: uint64, marks. lasting, waiting: bool; the key lasts, and no compaction has dropped the sample yet.
    sources: int64, the request that each is of, as a position among `requests`, their ids.
    """

    marks: Marks
    places: NDArray[np.uint64]
    objects: NDArray[np.uint64]
    cuts: NDArray[np.uint64]
    shards: NDArray[np.uint64]
    rows: NDArray[np.int64]
    keys: NDArray[np.uint64]
    contents: NDArray[np.uint64]
    lasting: NDArray[np.bool_]
    waiting: NDArray[np.bool_]
    sources: NDArray[np.int64]
    requests: tuple[str, ...]

    def without(self, requests: Collection[str]) -> Takedowns:
        """Those of other requests alone."""
        left_out = [at for at, id in enumerate(self.requests) if id in requests]
        if not left_out:
            return self
        kept = ~np.isin(self.sources, left_out)
        arrays = {each.name: getattr(self, each.name)[kept] for each in fields(self) if each.name not in _NO_ARRAYS}
        return replace(self, **arrays)

    def __len__(self) -> int:
        return len(self.rows)

    def contents_of(self, key: int) -> NDArray[np.uint64]:
        first, stop = (np.searchsorted(self.keys, np.uint64(key), side) for side in ("left", "right"))
        return self.contents[first:stop]

    def has_key(self, key: str) -> bool:
        return len(self.contents_of(_number(self.marks.key(key)))) > 0

    def has_image(self, sha256: str) -> bool:
        return bool((self.contents == np.uint64(_number(self.marks.content(sha256, None)))).any())

    def of_shard(self, shard: str, version: str, superseded: Touched = UNTOUCHED) -> OfShard:
        """superseded: of what `superseded` says, that of the shard's object."""
        here = self.places == _place(f"{shard}.{version}")
        # What was taken down from a sibling that stands lies there still, and is none of this shard's samples.
        moved = (self.objects == _place(object_of(shard))) & superseded.among(self.places)
        before = ((self.shards == _place(shard)) & ~here) | moved
        keys, contents = self.keys[before & self.lasting], self.contents[before & (self.contents != 0)]
        return OfShard(
            frozenset(self.rows[here].tolist()), frozenset(keys.tolist()), frozenset(contents.tolist()), self
        )

    def superseded(self, shards: Iterable[Shard]) -> dict[str, Touched]:
        """By object, the versions with tombstones that are not among `shards`, all that the input has now: what was
        taken down from them may lie in any other piece of the object."""
        if not len(self):
            return {}
        standing = list(shards)
        touched, objects = Touched(frozenset(self.objects.tolist())), {object_of(shard.id) for shard in standing}
        gone = ~np.isin(self.places, _places(f"{shard.id}.{shard.version}" for shard in standing))
        places = {name: self.places[gone & (self.objects == _place(name))] for name in objects if name in touched}
        return {name: Touched(frozenset(found.tolist())) for name, found in places.items() if len(found)}

    def rows_of(self, shard: str, version: str, waiting: bool | None = None) -> NDArray[np.int64]:
        """The removed rows of a shard's version, ascending. waiting: those alone that no compaction has dropped, or
        (False) that one has."""
        here = (self.places == _place(f"{shard}.{version}")) & self._of(waiting)
        rows: NDArray[np.int64] = np.unique(self.rows[here])
        return rows

    def touched(self, waiting: bool | None = None) -> Touched:
        return Touched(frozenset(self.places[self._of(waiting)].tolist()))

    def _of(self, waiting: bool | None) -> NDArray[np.bool_]:
        return self.waiting == waiting if waiting is not None else np.ones(len(self), bool)

    def dropped(self, listed: Sequence[tuple[str, str]], holding: Sequence[str]) -> tuple[str, ...]:
        """Requests whose samples are for sure in none of some parts. listed: their (shard, version). holding:
        `shard.version` of those that still hold samples.

        Where a shard that had any is listed in another version, or its object in another cut, nobody can be sure.
        """
        places, shards = _places(f"{shard}.{version}" for shard, version in listed), _places(name for name, _ in listed)
        moved = np.isin(self.shards, shards) & ~np.isin(self.places, places)
        cuts: dict[int, set[int]] = defaultdict(set)
        for name, _ in listed:
            cuts[_place(object_of(name))].add(_place(cut_of(name)))
        pairs, of = np.unique(np.stack([self.objects, self.cuts]), axis=1, return_inverse=True)
        recut = [bool(cuts.get(object_, set()) - {cut}) for object_, cut in pairs.T.tolist()]
        unsure = moved | np.array(recut, bool)[of.ravel()] | np.isin(self.places, _places(holding))
        unsure_of = {*self.sources[unsure].tolist()}
        return tuple(id for at, id in enumerate(self.requests) if at not in unsure_of)

    def suspects(self) -> Suspects:
        cuts: dict[int, set[int]] = defaultdict(set)
        for object_, cut in np.unique(np.stack([self.objects, self.cuts]), axis=1).T.tolist():
            cuts[object_].add(cut)
        return Suspects(frozenset(self.shards.tolist()), cuts)

    def samples(self, waiting: bool | None = None) -> int:
        """How many, each once however often it was asked for."""
        mine = self._of(waiting)
        return int(np.unique(np.stack([self.places[mine], self.rows[mine].view(np.uint64)]), axis=1).shape[1])


def requests(store: Store) -> dict[str, bool]:
    """Every request's id, oldest first, and whether what it removes is compacted."""
    names = set(store.names(FOLDER))
    ids = sorted(name.removesuffix(_SUFFIX) for name in names if name.endswith(_SUFFIX))
    return {id: f"{id}{_COMPACTED}" in names for id in ids}


def read_takedowns(store: Store) -> Takedowns:
    """One listing; what was read before is remembered in this process. Raises: LedgerError."""
    return _loaded(store, tuple(requests(store).items()))


@lru_cache(maxsize=2)
def _loaded(store: Store, known: tuple[tuple[str, bool], ...]) -> Takedowns:
    tables = [(_read(store, id), is_compacted) for id, is_compacted in known]
    table = pa.concat_tables([TOMBSTONE.empty_table(), *(table.replace_schema_metadata() for table, _ in tables)])
    keys = _numbers(table["key"])
    order = np.argsort(keys, kind="stable")
    shards = table["shard"].to_pylist()
    named = zip(shards, table["version"].to_pylist(), strict=True)
    lengths = [len(table) for table, _ in tables]
    waiting = np.repeat([not is_compacted for _, is_compacted in tables], lengths).astype(bool)
    return Takedowns(
        marks=Marks(_salt(store) if known else b""),
        places=_places(f"{shard}.{version}" for shard, version in named)[order],
        objects=_places(map(object_of, shards))[order],
        cuts=_places(map(cut_of, shards))[order],
        shards=_places(shards)[order],
        rows=table["row"].to_numpy()[order],
        keys=keys[order],
        contents=_numbers(table["content"])[order],
        lasting=table["key_lasts"].to_numpy()[order],
        waiting=waiting[order],
        sources=np.repeat(np.arange(len(tables)), lengths).astype(np.int64)[order],
        requests=tuple(id for id, _ in known),
    )


def _read(store: Store, id: str) -> pa.Table:
    path = f"{FOLDER}/{id}{_SUFFIX}"
    try:
        return pq.read_table(io.BytesIO(store.read(path, listed=True)))
    except pa.ArrowException as error:
        raise LedgerError(
            f"{store.uri(path)} is damaged: {error}", "Restore it from a backup: it says what may not be read again."
        ) from None


def read_requests(store: Store) -> list[Request]:
    """Oldest first."""
    found = (_read(store, id).schema.metadata or {} for id in requests(store))
    return [Request.model_validate_json(metadata[_ABOUT]) for metadata in found]


def marks_of(store: Store) -> Marks:
    """With the output's salt, which is made if there is none yet."""
    store.put_if_absent(SALT, uuid.uuid4().hex.encode())
    return Marks(_salt(store))


def _salt(store: Store) -> bytes:
    try:
        return store.read(SALT, lambda data: len(data) == 32)
    except FileNotFoundError:
        raise LedgerError(
            f"{store.uri(SALT)} is gone: without it removed samples cannot be recognised", "Restore it from a backup."
        ) from None


def record(store: Store, tombstones: pa.Table, by: str, reason: str) -> Request:
    """Puts a request with its tombstones, of schema TOMBSTONE: from then on they hold."""
    now = datetime.now(UTC)
    id = f"{now:%Y%m%dT%H%M%SZ}-{uuid.uuid4().hex[:8]}"
    made = Request(id=id, made=f"{now:%Y-%m-%d %H:%M:%S} UTC", by=by, reason=reason, samples=tombstones.num_rows)
    sink = pa.BufferOutputStream()
    pq.write_table(tombstones.replace_schema_metadata({_ABOUT: made.model_dump_json()}), sink, compression="zstd")
    store.put_atomic(f"{FOLDER}/{id}{_SUFFIX}", sink.getvalue().to_pybytes())
    return made


def note_compacted(store: Store, ids: Iterable[str]) -> None:
    """That no part has a sample of these requests any more."""
    for id in ids:
        store.put_atomic(f"{FOLDER}/{id}{_COMPACTED}", json.dumps({"compacted": f"{datetime.now(UTC)}"}).encode())
