"""What was taken down, as an index sees it: the ids that nobody may find, and the releases that hold their vectors."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pyarrow.parquet as pq

from pipelines.index.parts import Ids, PartRange, Parts, open_part, shard_of, version_of
from pipelines.index.release import Release
from pipelines.index.selection import Selection, end_of
from pipelines.ledger import object_of
from pipelines.storage import Store
from pipelines.takedowns import Takedowns, read_takedowns


def not_removed(store: Store, parts: Parts, known: Takedowns) -> Selection | None:
    """The ids that were not taken down; None where nothing was. Opens the parts that hold such alone.

    Of a part that is gone, of an object with takedowns, no id may be found: nobody can tell any more whose it was.
    """
    if not len(known):
        return None
    selection = Selection.every(end_of(parts))
    gone = _gone(store, parts, known)
    selection = selection.without_ranges((part.offset, part.offset + part.rows) for part in gone)
    denied = [ids for part, ids in _waiting(store, parts, known) if part not in gone]
    return selection.without(np.concatenate(denied)) if denied else selection


def holds_removed(store: Store, release: Release) -> bool:
    """Whether index or side files may have a vector of what was taken down.

    Such a vector lies in a part that still holds it, or that a compaction, or a change of its input, has done away
    with since.
    """
    known, parts = read_takedowns(store), release.parts
    return bool(_gone(store, parts, known)) or any(len(ids) for _, ids in _waiting(store, parts, known))


def _gone(store: Store, parts: Parts, known: Takedowns) -> list[PartRange]:
    objects = known.touched_objects()
    touched = [part for part in parts.ranges if object_of(shard_of(part.name)) in objects]
    there = set(store.names(parts.folder)) if touched else set()
    return [part for part in touched if part.name not in there]


def _waiting(store: Store, parts: Parts, known: Takedowns) -> Iterator[tuple[PartRange, Ids]]:
    """The removed ids of each part that may hold some until it is compacted."""
    touched = known.touched(waiting=True)
    for part in parts.ranges:
        shard, version = shard_of(part.name), version_of(part.name)
        if f"{shard}.{version}" in touched and store.exists(parts.path(part)):
            with open_part(store, parts.path(part)) as stream:
                rows = pq.read_table(stream, columns=["row"], use_threads=False, pre_buffer=False)["row"]
            removed = np.isin(rows.to_numpy(), known.rows_of(shard, version, waiting=True))
            yield part, part.offset + np.flatnonzero(removed)
