"""Drops removed samples from the parts for good: what holds one is written again as the commit's next generation."""

from __future__ import annotations

import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from pipelines.config import WriteConfig, validate
from pipelines.errors import LedgerError
from pipelines.ledger import (
    COMMITS,
    RETIRED,
    Commit,
    CommitRef,
    Counts,
    Part,
    commit,
    finish,
    list_commits,
    place,
    read_commit,
    retire,
    staging_folder,
    standing_commits,
)
from pipelines.merge import PartFiles
from pipelines.record import read_record
from pipelines.storage import Store, scratch_folder
from pipelines.takedowns import Takedowns, read_takedowns

THREADS = 4
Ids = NDArray[np.int64]


@dataclass(frozen=True)
class Holding:
    """A commit whose parts hold removed rows. items: so many, by data set. rows: of the shard, the removed ones."""

    commit: Commit
    rows: Ids
    items: dict[str, int]

    @property
    def told(self) -> str:
        counted = ", ".join(f"{count:,} of {dataset}" for dataset, count in self.items.items() if count)
        return f"shard {self.commit.shard} ({counted})"


@dataclass
class Dropped:
    """What was left out while a commit's parts were written again."""

    rows: set[int] = field(default_factory=set)
    items: Counter[str] = field(default_factory=Counter)
    rejects: Counter[str] = field(default_factory=Counter)
    reasons: Counter[str] = field(default_factory=Counter)


def compact_parts(
    store: Store, done: Callable[[Holding], None] = lambda holding: None, waiting: bool | None = None
) -> list[Holding]:
    """Every family's parts without what was taken down; what they were.

    May die at any moment and be run again, or beside another: each commit follows the ledger's own protocol, and what
    one that died has begun is finished first. Memory: a row group of each of 4 parts. waiting: as for `holdings`.
    Raises: LedgerError, StorageError.
    """
    write = validate(WriteConfig, read_record(store).settings.get("write") or {})
    finish(store)
    held = list(holdings(store, waiting))
    generations = {family: _generations(store, family) for family in {each.commit.family for each in held}}

    def compacted(holding: Holding) -> Holding:
        old = holding.commit
        _compact(store, holding, generations[old.family][old.shard, old.version] + 1, write)
        return holding

    pool = ThreadPoolExecutor(THREADS)
    try:
        for holding in pool.map(compacted, held):
            done(holding)
    finally:
        pool.shutdown(cancel_futures=True)
    return held


def holdings(store: Store, waiting: bool | None = None) -> Iterator[Holding]:
    """The standing commits that hold rows which were taken down. Opens only those of shards that had takedowns.

    waiting: of takedowns that no compaction has dealt with yet; False: of those that one has, so that there should be
    none; None: of all.
    """
    known = read_takedowns(store)
    touched = known.touched(waiting)
    for family in sorted({name.split("/")[0] for name in store.names(COMMITS)}):
        for ref in standing_commits(store, family):
            if f"{ref.shard}.{ref.version}" in touched and (holding := _holding(store, ref, known, waiting)):
                yield holding


def _holding(store: Store, ref: CommitRef, known: Takedowns, waiting: bool | None) -> Holding | None:
    try:
        standing = read_commit(store, ref)
        rows = known.rows_of(ref.shard, ref.version, waiting)
        items = {part.dataset: _count(store, part, rows) for part in standing.parts}
    except FileNotFoundError as error:
        if not store.exists(ref.path):
            return None  # replaced by another run meanwhile
        raise LedgerError(
            f"{store.uri(ref.path)} names a part that is gone, so that nobody can tell what it held: {error}",
            "Wait for an embed run that is at work; else move the commit away, and run the same `vecmill embed` again.",
        ) from None
    return Holding(standing, rows, items) if any(items.values()) else None


def _count(store: Store, part: Part, rows: Ids) -> int:
    """In a part that may not be in its place yet, or come there just now. Raises: FileNotFoundError."""
    for path in (part.final, part.staged):
        with suppress(FileNotFoundError):
            return _count_in(store, path, rows)
    return _count_in(store, part.final, rows)


def _count_in(store: Store, path: str, rows: Ids) -> int:
    with store.open(path) as stream:
        column = pq.read_table(stream, columns=["row"], use_threads=False, pre_buffer=False)["row"]
    return int(np.isin(column.to_numpy(), rows).sum())


def _compact(store: Store, holding: Holding, generation: int, write: WriteConfig) -> None:
    old = holding.commit
    if not all(store.exists(part.final) for part in old.parts):
        place(store, old)
    ref = old.ref._replace(generation=generation)
    staging = staging_folder(ref.family, ref.shard, ref.version, old.fingerprint)
    candidate = _written_again(store, holding, ref, f"{staging}/{uuid.uuid4().hex}", write)
    standing = commit(store, candidate)
    if standing.attempt != candidate.attempt:
        store.delete(part.staged for part in candidate.parts)
    try:
        place(store, standing)
    except LedgerError:
        # Collected while this was thought to be dead. What was there before still stands.
        if standing.attempt == candidate.attempt:
            store.delete([ref.path])
        raise
    retire(store, old.ref)


def _generations(store: Store, family: str) -> dict[tuple[str, str], int]:
    """The highest that each shard's version ever had, so that a final name is written with one set of bytes."""
    refs = [ref for top in (COMMITS, RETIRED) for ref in list_commits(store, family, top)]
    return {(ref.shard, ref.version): ref.generation for ref in sorted(refs, key=lambda ref: ref.generation)}


def _written_again(store: Store, holding: Holding, ref: CommitRef, folder: str, write: WriteConfig) -> Commit:
    """The commit, not yet put, of parts under `folder` that lack the rows."""
    old, dropped = holding.commit, Dropped()
    with scratch_folder() as scratch:
        schemas = {part.dataset: _schema(store, part) for part in old.parts}
        files = PartFiles(schemas, Path(scratch), write)
        for part in old.parts:
            for table in _row_groups(store, part):
                gone = pc.is_in(table["row"], pa.array(holding.rows))
                _note(dropped, part.dataset, table.filter(gone))
                files.add({part.dataset: table.filter(pc.invert(gone))})
        parts = files.put(store, ref, folder)
    return old.model_copy(
        update={
            "generation": ref.generation,
            "attempt": folder.rpartition("/")[2],
            "removed": old.removed + len(dropped.rows),
            "parts": parts,
            "counts": {name: _counts(old, name, count, dropped) for name, count in old.counts.items()},
            "reasons": {name: left for name, count in old.reasons.items() if (left := count - dropped.reasons[name])},
        }
    )


def _schema(store: Store, part: Part) -> pa.Schema:
    with store.open(part.final) as stream:
        return pq.read_schema(stream)


def _row_groups(store: Store, part: Part) -> Iterator[pa.Table]:
    with store.open(part.final) as stream, pq.ParquetFile(stream, pre_buffer=False) as file:
        for group in range(file.num_row_groups):
            yield file.read_row_group(group, use_threads=False)


def _note(dropped: Dropped, dataset: str, gone: pa.Table) -> None:
    dropped.rows |= set(gone["row"].to_pylist())
    dropped.items[dataset] += gone.num_rows
    if dataset.startswith("rejects/"):
        dropped.rejects.update(gone["modality"].to_pylist())
        dropped.reasons.update(gone["reason"].to_pylist())


def _counts(old: Commit, modality: str, count: Counts, dropped: Dropped) -> Counts:
    embedded, rejected = dropped.items[f"embeddings/{old.family}/{modality}"], dropped.rejects[modality]
    return count.plus(Counts(embedded=-embedded, rejected=-rejected, removed=embedded + rejected))
