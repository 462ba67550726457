"""The write operator: groups what arrives by shard and family, and commits the shards that are whole.

Write first, list second: whoever puts a fragment then lists them, so the last writer sees all and no
coordinator is needed. Ray may retry a write without end, so every step may be done again.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import reduce
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
from ray.data import Datasink

from pipelines.config import WriteConfig
from pipelines.contracts import SAMPLES_FAMILY
from pipelines.errors import LedgerError
from pipelines.families import Family
from pipelines.fragments import is_whole
from pipelines.ledger import Commit, CommitRef, Plan, commit, object_of, place, read_commit, retire, staging_folder
from pipelines.merge import list_fragments, merge, put_fragments
from pipelines.observe import Clock, Observe, nowhere, peak_memory_mib
from pipelines.storage import Store
from pipelines.takedowns import UNTOUCHED, Touched, read_takedowns


class EmbeddingSink(Datasink[None]):
    """Takes encoded blocks of any shards in any order.

    families: by name, those that a row's `families` may name. plan: tells which older versions are retired when
    a shard's new one commits, and which generation of it this is. superseded: as a ShardSource's.
    """

    def __init__(
        self,
        store: Store,
        families: dict[str, Family],
        write: WriteConfig,
        plan: Plan | None = None,
        observe: Observe = nowhere,
        superseded: Mapping[str, Touched] | None = None,
    ) -> None:
        self._store, self._families, self._write, self._observe = store, families, write, observe
        self._superseded = superseded or {}
        self._changed = dict(plan.changed) if plan else {}
        self._generations = plan.generations if plan else {}

    def get_name(self) -> str:
        return "Write"

    @property
    def min_rows_per_write(self) -> int | None:
        return self._write.rows_per_task

    def write(self, blocks: Iterable[pa.Table], ctx: Any) -> None:
        """Runs in a task, perhaps more than once on the same blocks."""
        clock = Clock()
        with clock.running():
            arrived = pa.concat_tables([block for block in blocks if block.num_rows], promote_options="permissive")
            commits = [done for rows in _by_destination(arrived) for done in self._write_shard(rows)]
        self._observe(
            stage="write",
            rows=arrived.num_rows,
            seconds=clock.seconds,
            shards=len({done.ref for done in commits if done.family != SAMPLES_FAMILY}),
            peak_mib=peak_memory_mib(),
        )

    def _write_shard(self, rows: pa.Table) -> list[Commit]:
        """Writes rows of one shard to the families that they are for; the commits that this made whole."""
        first = rows.slice(0, 1).select(["shard", "shard_uri", "version", "families"]).to_pylist()[0]
        ends = rows.filter(rows["end"])
        end = ends["row"][0].as_py() if ends.num_rows else None
        body = _distinct(rows.filter(pc.invert(rows["end"])))
        standing = []
        for name in first["families"]:
            ref = CommitRef(name, first["shard"], first["version"], self._generations.get((name, first["shard"]), 0))
            superseded = self._superseded.get(object_of(ref.shard), UNTOUCHED)
            incoming = Incoming(ref, first["shard_uri"], body, end, self._older(ref), superseded)
            standing.append(write_family(self._store, self._families[name], incoming, self._write))
        return [done for done in standing if done]

    def _older(self, ref: CommitRef) -> list[CommitRef]:
        """With the samples go the vectors of encoders that this run does not write: they would meet other captions."""
        strangers = ref.family == SAMPLES_FAMILY
        return [
            old
            for old in self._changed.get(ref.shard, [])
            if old.family == ref.family or (strangers and old.family not in self._families)
        ]


@dataclass(frozen=True)
class Incoming:
    """Rows of one shard (sorted, distinct) for one family, and the number of its rows where the end mark came.

    older: commits of earlier versions of the shard, to be retired when this one commits. superseded: of its object.
    """

    ref: CommitRef
    uri: str
    rows: pa.Table
    end: int | None
    older: list[CommitRef] = field(default_factory=list)
    superseded: Touched = UNTOUCHED


def write_family(store: Store, family: Family, incoming: Incoming, write: WriteConfig) -> Commit | None:
    """Puts the rows in staging; where that makes the shard whole, merges, commits and places it.

    Returns the commit that stands, None while the shard is not whole.
    """
    ref = incoming.ref
    staging = staging_folder(ref.family, ref.shard, ref.version, family.fingerprint)
    put_fragments(store, staging, incoming.rows.select(family.columns), incoming.end)
    fragments = list_fragments(store, staging)
    if not is_whole(fragments):
        return None
    try:
        taken_down = read_takedowns(store).of_shard(ref.shard, ref.version, incoming.superseded)
        candidate = merge(store, family, ref, incoming.uri, staging, fragments, write, taken_down)
    except FileNotFoundError:
        return _commit_of_another(store, ref)
    standing = commit(store, candidate)
    if standing.attempt != candidate.attempt:
        store.delete(part.staged for part in candidate.parts)
    for old in incoming.older:
        retire(store, old)
    try:
        place(store, standing)
    except LedgerError:
        # Its parts were collected while this task was thought to be dead: no data, so no commit.
        if standing.attempt == candidate.attempt:
            store.delete([ref.path])
        raise
    return standing


def _commit_of_another(store: Store, ref: CommitRef) -> Commit:
    """A fragment is missing only where another attempt has committed and cleared the staging. Raises: LedgerError."""
    try:
        standing = read_commit(store, ref, listed=True)
    except FileNotFoundError:
        raise LedgerError(
            f"Fragments of shard {ref.shard} have gone from staging, and no commit {store.uri(ref.path)} is there",
            "Run the same command again: the shard will be done again.",
        ) from None
    place(store, standing)
    return standing


def _by_destination(rows: pa.Table) -> list[pa.Table]:
    """Rows apart by shard and by the families they are for."""
    keyed = rows.append_column("destination", _joined(rows["families"]))
    names = ["shard", "version", "destination"]
    keys = keyed.select(names).group_by(names).aggregate([]).to_pylist()
    return [rows.filter(reduce(pc.and_, (pc.equal(keyed[name], key[name]) for name in names))) for key in keys]


def _joined(families: pa.ChunkedArray) -> pa.ChunkedArray:
    return pc.binary_join(families.cast(pa.list_(pa.string())), "/")


def _distinct(rows: pa.Table) -> pa.Table:
    """Rows in order, each number once: a retried read may deliver some of them twice."""
    rows = rows.sort_by("row")
    numbers = rows["row"].to_numpy()
    keep = pa.array([True, *(numbers[1:] != numbers[:-1])][: len(numbers)], pa.bool_())
    return rows.filter(keep)
