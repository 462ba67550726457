"""What runs that died left in an output, and its removal: orphans, staging, retired commits, unfinished indexes.

Everything is found by listing names. Nothing that a commit or a release names is ever touched.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from pipelines.index.release import unfinished
from pipelines.lease import COLLECT, FOLDER, held
from pipelines.ledger import COMMITS, RETIRED, STAGING, list_commits, make_plan, place, read_commits, retire
from pipelines.storage import Store, is_temporary

DATA = ("samples", "embeddings", "rejects")
_PART = re.compile(r"part-(?P<stem>.+)\.parquet")


@dataclass(frozen=True)
class Leftover:
    """An object that nothing names. kind: a short word for people and machines."""

    kind: str
    path: str
    bytes: int


def leftovers(store: Store) -> list[Leftover]:
    """All there are now; of a run that is at work too, so that only `collect` may delete them. Changes nothing."""
    named = {family: _stems(store, family) for family in _families(store)}
    found = [*_of_parts(store, named), *_of_staging(store), *_of_indexes(store)]
    found += [Leftover("retired", path, size) for path, size in store.sizes(RETIRED)]
    return found


def collect(store: Store, say: Callable[[str], None] = lambda line: None) -> list[Leftover]:
    """Deletes what no commit and no release names; what was begun and only lacks its end is finished first.

    Returns what there was. Raises: HeldError while a run is at work on the output.
    """
    with held(store, COLLECT, "collect", excludes=lambda other: True, say=say):
        before = leftovers(store)
        _finish(store)
        store.delete(leftover.path for leftover in leftovers(store))
        store.delete_folder(STAGING)
        # All others are dead: no lease is held beside this one.
        store.delete(f"{FOLDER}/{name}" for name in store.names(FOLDER) if not name.startswith(f"{COLLECT}/"))
    return before


def totals(found: Iterable[Leftover]) -> dict[str, tuple[int, int]]:
    """Objects and bytes by kind."""
    objects: Counter[str] = Counter()
    sizes: Counter[str] = Counter()
    for leftover in found:
        objects[leftover.kind] += 1
        sizes[leftover.kind] += leftover.bytes
    return {kind: (count, sizes[kind]) for kind, count in objects.items()}


def _finish(store: Store) -> None:
    """Retirements and placements that a run began; the latter lie in the staging of what is committed."""
    families = _families(store)
    for ref in make_plan(store, [], families).superseded:
        retire(store, ref)
    for family in families:
        staged = {name.split("/")[0].rpartition(".")[0] for name in store.names(f"{STAGING}/{family}")}
        unplaced = (ref for ref in list_commits(store, family) if f"{ref.shard}.{ref.version}" in staged)
        for standing in read_commits(store, unplaced):
            place(store, standing)


def _families(store: Store) -> list[str]:
    names = (name for top in (COMMITS, RETIRED) for name in store.names(top))
    return sorted({name.split("/")[0] for name in names if "/" in name})


def _stems(store: Store, family: str) -> set[str]:
    return {ref.stem for ref in list_commits(store, family)}


def _of_parts(store: Store, named: dict[str, set[str]]) -> Iterator[Leftover]:
    for top in DATA:
        for path, size in store.sizes(top):
            folder, _, name = path.rpartition("/")
            part = _PART.fullmatch(name)
            family = folder.split("/")[1] if "/" in folder else top
            if is_temporary(name) or (part and part["stem"] not in named.get(family, ())):
                yield Leftover("orphan", path, size)
    for top in (COMMITS, "reports"):
        yield from (Leftover("orphan", path, size) for path, size in store.sizes(top) if is_temporary(path))


def _of_staging(store: Store) -> Iterator[Leftover]:
    yield from (Leftover("staging", path, size) for path, size in store.sizes(STAGING))


def _of_indexes(store: Store) -> Iterator[Leftover]:
    """Index versions without a manifest: no release."""
    sizes = dict(store.sizes("index"))
    homes = {"/".join(path.split("/")[:3]) for path in sizes}
    begun = tuple(f"{home}/{version}/" for home in homes for version in unfinished(store, home))
    for path, size in sizes.items():
        if path.startswith(begun) or is_temporary(path):
            yield Leftover("index", path, size)
