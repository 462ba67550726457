"""What runs that died left in an output, and its removal: orphans, staging, retired commits, unfinished indexes.

Everything is found by listing names. Nothing that a commit or a release names is ever touched.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from pipelines.errors import LedgerError
from pipelines.index.versions import unfinished
from pipelines.lease import COLLECT, Say, held
from pipelines.lease import FOLDER as LEASES
from pipelines.ledger import (
    COMMITS,
    RETIRED,
    STAGING,
    CommitRef,
    families_of,
    finish,
    list_commits,
    place,
    read_commits,
)
from pipelines.local_disk import is_temporary
from pipelines.storage import Store
from pipelines.takedowns import FOLDER

DATA = ("samples", "embeddings", "translations", "rejects")
UPLOAD = "upload"
UPLOADING = (*DATA, STAGING, "index")
"""Whose writers hold a lease."""
_PART = re.compile(r"part-(?P<stem>[^.]+\.[^.]+\.\d+)\.parquet")


@dataclass(frozen=True)
class Leftover:
    """An object that nothing names. kind: a short word for people and machines."""

    kind: str
    path: str
    bytes: int


def leftovers(store: Store) -> list[Leftover]:
    """All there are now; of a run that is at work too, so that only `collect` may delete them. Changes nothing."""
    # Data first, commits second: whatever is placed was committed before.
    data = [(path, size) for top in DATA for path, size in store.sizes(top)]
    staging = [Leftover("staging", path, size) for path, size in store.sizes(STAGING)]
    named = {family: {ref.stem for ref in list_commits(store, family)} for family in families_of(store)}
    found = [Leftover("orphan", path, size) for path, size in data if _is_orphan(path, named)]
    found += [Leftover("orphan", path, size) for path, size in _torn(store)]
    found += [*staging, *_of_indexes(store)]
    found += [Leftover("retired", path, size) for path, size in store.sizes(RETIRED)]
    found += [Leftover(UPLOAD, upload.path, upload.bytes) for upload in store.uploads(UPLOADING)]
    return found


def collect(store: Store, say: Say = lambda line: None) -> list[Leftover]:
    """Deletes what no commit and no release names; what was begun and only lacks its end is finished first.

    Returns what there was. Raises: HeldError while a run is at work on the output.
    """
    with held(store, COLLECT, "collect", excludes=lambda other: True, say=say):
        before = leftovers(store)
        finish(store)
        clear(store)
    return before


def clear(store: Store) -> None:
    """Deletes what nothing names, of runs that are dead: for whoever holds the lease that excludes all others."""
    known = _commits(store)
    store.delete(leftover.path for leftover in leftovers(store) if leftover.kind != UPLOAD)
    store.abort(store.uploads(UPLOADING))
    _withdraw(store, _commits(store) - known)


def _withdraw(store: Store, committed: set[CommitRef]) -> None:
    """Commits made meanwhile by a task of a run that is dead: placed, or taken back where the parts have gone."""
    for standing in read_commits(store, committed):
        try:
            place(store, standing)
        except LedgerError:
            store.delete([standing.ref.path])


def totals(found: Iterable[Leftover]) -> dict[str, tuple[int, int]]:
    """Objects and bytes by kind."""
    objects: Counter[str] = Counter()
    sizes: Counter[str] = Counter()
    for leftover in found:
        objects[leftover.kind] += 1
        sizes[leftover.kind] += leftover.bytes
    return {kind: (count, sizes[kind]) for kind, count in objects.items()}


def _commits(store: Store) -> set[CommitRef]:
    return {ref for family in families_of(store) for ref in list_commits(store, family)}


def _is_orphan(path: str, named: dict[str, set[str]]) -> bool:
    """A part of ours that no commit of its family names, or what a torn put left."""
    folders, _, name = path.rpartition("/")
    part = _PART.fullmatch(name)
    family = folders.split("/")[1] if "/" in folders else folders
    return is_temporary(name) or bool(part and part["stem"] not in named.get(family, ()))


def _torn(store: Store) -> Iterator[tuple[str, int]]:
    """Path and bytes of what puts to a local disk left that died, but for those of folders of data."""
    yield from ((entry.uri.rpartition("/")[2], entry.bytes) for entry in store.glob(".*.tmp"))
    for top in (COMMITS, "reports", FOLDER, LEASES, "projections"):
        yield from (item for item in store.sizes(top) if is_temporary(item[0]))


def _of_indexes(store: Store) -> Iterator[Leftover]:
    """Index versions without a manifest: no release."""
    sizes = dict(store.sizes("index"))
    homes = {"/".join(path.split("/")[:3]) for path in sizes}
    begun = tuple(f"{home}/{version}/" for home in homes for version in unfinished(store, home))
    for path, size in sizes.items():
        if path.startswith(begun) or is_temporary(path):
            yield Leftover("index", path, size)
