"""What was taken down, as an index sees it: the ids that nobody may find, and the releases that hold their vectors."""

from __future__ import annotations

from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import pyarrow.parquet as pq

from pipelines.index.manifest import Release
from pipelines.index.parts import Ids, PartRange, Parts, ReplacedError, open_part, shard_of, version_of
from pipelines.index.selection import Selection, end_of
from pipelines.storage import Store
from pipelines.takedowns import Takedowns, read_takedowns

THREADS = 16


@dataclass(frozen=True)
class Denied:
    """What takedowns leave to be found; allowed is None where that is everything.

    written_again: ids of parts that are gone, denied though most of what they stand for is still there.
    """

    allowed: Selection | None
    written_again: int


def denied(store: Store, parts: Parts, known: Takedowns) -> Denied:
    """Opens the parts that hold what was taken down, 16 at a time, and no others.

    Of a part that is gone, of a shard that may have held some, no id may be found: nobody can tell any more whose it
    was.
    """
    if not len(known):
        return Denied(None, 0)
    there, gone = _touched(store, parts, known)
    allowed = Selection.every(end_of(parts)).without_ranges((part.offset, part.offset + part.rows) for part in gone)
    for _, ids in _waiting(store, parts, there, known):
        allowed = allowed.without(ids)
    return Denied(allowed, sum(part.rows for part in gone if not part.gone))


def not_removed(store: Store, parts: Parts, known: Takedowns) -> Selection | None:
    """The ids that were not taken down; None where nothing was."""
    return denied(store, parts, known).allowed


def holds_removed(store: Store, release: Release) -> bool:
    """Whether index or side files may have a vector of what was taken down.

    Such a vector lies in a part that still holds it, or that a compaction, or a change of its input, has done away
    with since.
    """
    known, parts = read_takedowns(store).without(release.dropped), release.parts
    there, gone = _touched(store, parts, known)
    return bool(gone) or any(len(ids) for _, ids in _waiting(store, parts, there, known))


def dropped(store: Store, parts: Parts, known: Takedowns) -> tuple[str, ...]:
    """Requests of `known`, read before the parts were listed, of which these hold nothing for sure."""
    holding = [part for part, ids in _waiting(store, parts, parts.ranges, known) if len(ids)]
    return known.dropped(list(map(_place, parts.ranges)), [".".join(_place(part)) for part in holding])


def _place(part: PartRange) -> tuple[str, str]:
    return shard_of(part.name), version_of(part.name)


def _touched(store: Store, parts: Parts, known: Takedowns) -> tuple[list[PartRange], list[PartRange]]:
    """Parts of shards that may have held what was taken down: those that are there, and those that are gone."""
    suspects = known.suspects()
    touched = [part for part in parts.ranges if shard_of(part.name) in suspects]
    names = set(store.names(parts.folder)) if touched else set()
    return [part for part in touched if part.name in names], [part for part in touched if part.name not in names]


def _waiting(store: Store, parts: Parts, there: Iterable[PartRange], known: Takedowns) -> list[tuple[PartRange, Ids]]:
    """Each part that may hold some until it is compacted, with the removed ids that it has."""
    touched = known.touched(waiting=True)
    holders = [part for part in there if ".".join(_place(part)) in touched]
    with ThreadPoolExecutor(THREADS) as pool:
        return list(zip(holders, pool.map(lambda part: _removed_ids(store, parts, part, known), holders), strict=True))


def _removed_ids(store: Store, parts: Parts, part: PartRange, known: Takedowns) -> Ids:
    removed = known.rows_of(*_place(part), waiting=True)
    try:
        with open_part(store, parts.path(part)) as stream:
            rows = pq.read_table(stream, columns=["row"], use_threads=False, pre_buffer=False)["row"]
    except ReplacedError:
        return np.arange(part.offset, part.offset + part.rows)  # gone since it was listed
    return part.offset + np.flatnonzero(np.isin(rows.to_numpy(), removed))
