"""Finds the samples that somebody asks to have taken down, and records that they are."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipelines.contracts import SAMPLES_FAMILY
from pipelines.errors import LedgerError
from pipelines.ledger import CommitRef, place, read_commit, standing_commits
from pipelines.storage import Store
from pipelines.takedowns import TOMBSTONE, Marks, Request, Takedowns, marks_of, read_takedowns, record

THREADS = 8
_SEEN = ["row", "key", "sha256", "captions", "row_group"]


@dataclass(frozen=True)
class Asked:
    """What is to go: samples with these keys, and those whose image has one of these SHA-256 (hex)."""

    keys: list[str] = field(default_factory=list)
    sha256: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Found:
    """Samples of one shard's version. rows: columns row, key, sha256, captions and key_lasts."""

    ref: CommitRef
    rows: pa.Table


@dataclass(frozen=True)
class Removal:
    """What a request came to. found: the samples of it that were not removed before. before: how many were.

    missing: what was asked for and is in no sample. request: None where nothing was recorded.
    """

    found: list[Found]
    before: int
    missing: list[str]
    request: Request | None = None

    @property
    def samples(self) -> int:
        return sum(found.rows.num_rows for found in self.found)


def remove(store: Store, asked: Asked, by: str, reason: str, dry_run: bool = False) -> Removal:
    """Takes down what is asked for: nobody finds it from now on, and no later run embeds it again.

    Holds what is asked for and what is found, and of each of 8 parts of `samples/` one row group's keys. Shards that
    are committed while it looks are looked at too. dry_run: records nothing.
    """
    known = read_takedowns(store)
    looked: set[CommitRef] = set()
    found: list[Found] = []
    while new := set(standing_commits(store, SAMPLES_FAMILY)) - looked:
        found += _search(store, sorted(new), asked)
        looked |= new
    fresh = [each for each in (_without_removed(one, known) for one in found) if each.rows.num_rows]
    missing, compacted = _not_found(asked, found, known)
    removal = Removal(fresh, _samples(found) - _samples(fresh) + compacted, missing)
    if dry_run or not fresh:
        return removal
    marks = marks_of(store)
    tombstones = pa.concat_tables(_tombstones(each, marks) for each in fresh)
    return Removal(fresh, removal.before, removal.missing, record(store, tombstones, by, reason))


def _samples(found: list[Found]) -> int:
    return sum(each.rows.num_rows for each in found)


def _without_removed(found: Found, known: Takedowns) -> Found:
    gone = pa.array(known.rows_of(found.ref.shard, found.ref.version))
    return Found(found.ref, found.rows.filter(pc.invert(pc.is_in(found.rows["row"], gone))))


def _not_found(asked: Asked, found: list[Found], known: Takedowns) -> tuple[list[str], int]:
    """What nobody knows of, and how many are known by their marks alone: of samples that a compaction dropped."""
    keys = {key for each in found for key in each.rows["key"].to_pylist()}
    images = {digest for each in found for digest in each.rows["sha256"].to_pylist()}
    absent = [key for key in asked.keys if key not in keys]
    unknown = [key for key in absent if not known.has_key(key)]
    unseen = [digest for digest in asked.sha256 if digest not in images]
    strange = [digest for digest in unseen if not known.has_image(digest)]
    return [*unknown, *strange], len(absent) - len(unknown) + len(unseen) - len(strange)


def _search(store: Store, refs: list[CommitRef], asked: Asked) -> Iterator[Found]:
    keys, images = pa.array(asked.keys, pa.string()), pa.array(asked.sha256, pa.string())

    def look(ref: CommitRef) -> Found | None:
        # Gone where its shard was replaced meanwhile; the commit that took its place is looked at next.
        with suppress(FileNotFoundError):
            rows = _in_part(store, ref, keys, images)
            return Found(ref, rows) if rows.num_rows else None
        return None

    with ThreadPoolExecutor(THREADS) as pool:
        yield from filter(None, pool.map(look, refs))


def _in_part(store: Store, ref: CommitRef, keys: pa.Array, images: pa.Array) -> pa.Table:
    path = f"{SAMPLES_FAMILY}/part-{ref.stem}.parquet"
    if not store.exists(path):
        _place(store, ref)
    searched = ["key", "sha256"] if len(images) else ["key"]
    with store.open(path) as stream, pq.ParquetFile(stream, pre_buffer=False) as file:
        tables = []
        for group in range(file.num_row_groups):
            table = file.read_row_group(group, searched, use_threads=False)
            wanted = pc.is_in(table["key"], keys)
            if len(images):
                wanted = pc.or_(wanted, pc.is_in(table["sha256"], images))
            if pc.any(wanted).as_py():
                rows = file.read_row_group(group, _SEEN, use_threads=False)
                tables.append(_with_lasting(rows).filter(wanted))
        return pa.concat_tables(tables) if tables else _with_lasting(file.schema_arrow.empty_table().select(_SEEN))


def _place(store: Store, ref: CommitRef) -> None:
    """What a run has committed and not yet placed. Raises: FileNotFoundError where another takes it away just now."""
    try:
        place(store, read_commit(store, ref))
    except LedgerError:
        if store.exists(ref.path):
            raise
        raise FileNotFoundError(ref.path) from None


def _with_lasting(rows: pa.Table) -> pa.Table:
    """Rows of a Parquet file that has no keys are called by their numbers, which shift when the file changes."""
    first = _first_number(rows)
    numbered = False
    if first is not None:
        counted = pc.add(rows["row"], first)
        numbered = pc.all(pc.equal(rows["key"], pc.cast(counted, pa.string()))).as_py()
    lasts = pa.array([not numbered] * rows.num_rows, pa.bool_())
    return rows.drop_columns(["row_group"]).append_column("key_lasts", lasts)


def _first_number(rows: pa.Table) -> int | None:
    """What the file's row 0 would be called, from the first of these; None where its key is no number of a row."""
    for row in rows.slice(0, 1).to_pylist():
        key = row["key"]
        if row["row_group"] is not None and key.isdecimal() and len(key) <= 19 and int(key) < 2**63:
            return int(key) - int(row["row"])
    return None


def _tombstones(found: Found, marks: Marks) -> pa.Table:
    return pa.Table.from_pylist(
        [
            {
                "shard": found.ref.shard,
                "version": found.ref.version,
                "row": row["row"],
                "key": marks.key(row["key"]),
                "key_lasts": row["key_lasts"],
                "content": marks.content(row["sha256"], row["captions"]),
            }
            for row in found.rows.to_pylist()
        ],
        TOMBSTONE,
    )
