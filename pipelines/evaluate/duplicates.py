"""Near-duplicates over a whole output: groups of items that are connected by pairs above a similarity."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components

from pipelines.contracts import Modality
from pipelines.errors import ConfigError
from pipelines.evaluate.groups import read_samples
from pipelines.evaluate.items import is_unit, require_one_vector
from pipelines.index.cache import Cache
from pipelines.index.choose import holds_codes
from pipelines.index.manifest import Release
from pipelines.index.parts import Ids, PartRange, Parts, Vectors, batches, list_grown, open_part
from pipelines.index.recall import ROUNDING, Top
from pipelines.index.release import read_release
from pipelines.index.removed import not_removed
from pipelines.index.selection import Selection, end_of
from pipelines.search import Searcher
from pipelines.storage import Store, scratch_folder
from pipelines.takedowns import read_takedowns

Keep = Literal["first", "largest"]
Say = Callable[[str], None]
GROUPS, KEEP, REMOVE, SUMMARY = "groups.parquet", "keep.txt", "remove.txt", "summary.json"
QUERIES_AT_ONCE = 4_096
HALF_ROUNDING = 1e-3
"""Of a cosine that an index gives: float16 makes unit vectors a little longer or shorter."""
SAID = 10
"""Lines of progress."""

SCHEMA = pa.schema(
    [
        pa.field("group", pa.int64()),
        pa.field("keep", pa.bool_()),
        pa.field("shard", pa.string()),
        pa.field("row", pa.int64()),
        pa.field("caption_index", pa.int32()),
        pa.field("key", pa.string()),
        pa.field("nearest", pa.float32()),
    ]
)
"""A member of a group of two or more. group: id of its first member; nearest: highest similarity to another member."""


@dataclass(frozen=True)
class Sought:
    """threshold: least cosine of a pair, but for rounding. k: neighbours looked at for each item; a
    group of any size is found through pairs, if each member has one of its group among them. keep: which of a group
    stays: the first, or the image of most pixels (the first of these). cache: as `Searcher` takes it: else files of an
    index in other storage are read again for every QUERIES_AT_ONCE items."""

    threshold: float = 0.95
    k: int = 20
    keep: Keep = "first"
    exact: bool = False
    release: str | None = None
    memory_mib: int = 4096
    cache: Cache | None = None


class Groups:
    """Connected items, a number of the set [0, n): the least of each group stands for it.

    nearest: float32 [n], highest score of a pair that the item is in, -inf without.
    """

    def __init__(self, count: int) -> None:
        self.first = np.arange(count)
        self.nearest = np.full(count, -np.inf, np.float32)

    def join(self, ones: Ids, others: Ids, scores: Vectors) -> None:
        """Pairs, int64 [n] each, and their scores. The result does not depend on the order of calls."""
        for side in (ones, others):
            np.maximum.at(self.nearest, side, scores)
        firsts, at = np.unique(np.concatenate([self.roots(ones), self.roots(others)]), return_inverse=True)
        near, far = at[: len(ones)], at[len(ones) :]
        edges = coo_matrix((np.ones(len(near), bool), (near, far)), shape=(len(firsts), len(firsts)))
        _, labels = connected_components(edges, directed=False)
        _, least = np.unique(labels, return_index=True)
        self.first[firsts] = firsts[least][labels]

    def roots(self, items: Ids) -> Ids:
        """int64: the first of each item's group."""
        found = self.first[items]
        while not np.array_equal(found, further := self.first[found]):
            found = further
        return found

    @property
    def count(self) -> int:
        return len(self.first)

    def all_roots(self) -> Ids:
        return self.roots(np.arange(len(self.first)))


@dataclass(frozen=True)
class Found:
    """By id. roots: the first of its group. sizes: of the group that it is the first of. nearest: as `Groups` has it.
    stays: one of each group, and what is in none. findable: what was not taken down. later: parts that have come since
    the release, in which nothing is looked for."""

    roots: Ids
    sizes: Ids
    nearest: Vectors
    stays: np.ndarray[Any, Any]
    findable: Selection
    later: Parts


def find_duplicates(
    store: Store,
    encoder: str,
    modality: Modality,
    sought: Sought,
    folder: str | None = None,
    say: Say = lambda line: None,
) -> dict[str, Any]:
    """Groups, and lists of keys to keep and to remove, written under `folder`; returns the summary that is there too.

    What was taken down is in none. Memory: the index if it fits `memory_mib`, else a shard of it at a time; 40 bytes an
    item; the keys to remove. Raises: ConfigError, of an index whose scores are no cosines too; IndexBuildError where
    there is no index and exact search is not asked for.
    """
    searcher = _searcher(store, encoder, modality, sought)
    require_one_vector(searcher.parts)
    target = folder or f"duplicates/{encoder}/{modality}"
    findable = searcher.findable() or Selection.every(end_of(searcher.parts))
    groups = connect(searcher, sought, findable, say)
    roots = groups.all_roots()
    sizes = np.bincount(roots, minlength=len(roots))
    stays = _staying(store, searcher, roots, sizes, sought.keep)
    found = Found(roots, sizes, groups.nearest, stays, findable, _later_parts(searcher))
    summary = {
        "encoder": encoder,
        "modality": modality,
        "release": _release_of(searcher, sought),
        **{name: getattr(sought, name) for name in ("threshold", "k", "keep", "exact")},
        "items": findable.total,
        "came_since": _findable_in(store, found.later),
        "groups": int((sizes > 1).sum()),
        "in_groups": int(sizes[sizes > 1].sum()),
        "remove": int((~stays).sum()),
        "largest": int(sizes.max(initial=0)),
        **_write(store, searcher.parts, target, found),
        "folder": store.uri(target),
    }
    store.put_atomic(f"{target}/{SUMMARY}", json.dumps(summary, indent=2).encode())
    return summary


def _release_of(searcher: Searcher, sought: Sought) -> str | None:
    """That was looked in; None where everything there is now was."""
    release = searcher.release if sought.release or not sought.exact else None
    return release.version if release else None


def _later_parts(searcher: Searcher) -> Parts:
    grown = list_grown(searcher.store, searcher.parts)
    return grown.run(len(searcher.parts.ranges), len(grown.ranges))


def _findable_in(store: Store, parts: Parts) -> int:
    allowed = not_removed(store, parts, read_takedowns(store))
    return sum(allowed.count(part.offset, part.offset + part.rows) if allowed else part.rows for part in parts.ranges)


def _searcher(store: Store, encoder: str, modality: Modality, sought: Sought) -> Searcher:
    if sought.exact:
        return Searcher(store, encoder, modality, sought.release, exact=True, metric="cosine")
    _require_unit(store, encoder)
    release = read_release(store, encoder, modality, sought.release)
    _require_exact_scores(store, release)
    fits = sum(shard.bytes for shard in release.shards) <= sought.memory_mib * 2**20
    return Searcher(store, encoder, modality, release, resident=fits, cache=sought.cache)


def _require_exact_scores(store: Store, release: Release) -> None:
    if release.rerank is None and holds_codes(release.index_key):
        raise ConfigError(
            f"{store.uri(release.folder)} holds codes ({release.index_key}) and no vectors to re-rank with: its "
            "scores are near cosines, and no cosines",
            "Compare with --exact, or build the index again: `vecmill index --rerank float16`.",
        )


def _require_unit(store: Store, encoder: str) -> None:
    if not is_unit(store, encoder):
        raise ConfigError(
            f"embeddings/{encoder} has vectors that are not of unit length: what an index says of them is no cosine",
            "Compare with --exact, or embed without normalize=false.",
        )


def connect(searcher: Searcher, sought: Sought, findable: Selection, say: Say = lambda line: None) -> Groups:
    """Asks for every findable item's neighbours, and joins those that are near enough."""
    groups, done, total = Groups(end_of(searcher.parts)), 0, findable.total
    least = min(sought.threshold, 1 - (ROUNDING if sought.exact else HALF_ROUNDING))
    for first, batch in batches(searcher.store, findable.of(searcher.parts)):
        for at in range(0, len(batch), QUERIES_AT_ONCE):
            there = np.flatnonzero(findable.mask(first + at, first + min(at + QUERIES_AT_ONCE, len(batch)))) + at
            top = searcher.nearest(batch[there], sought.k + 1, findable)
            groups.join(*_pairs(top, first + there, searcher.metric, least))
            done += len(there)
            if done * SAID // total > (done - len(there)) * SAID // total:
                say(f"{done:,} of {total:,} looked at")
    return groups


def _pairs(top: Top, asked: Ids, metric: str, least: float) -> tuple[Ids, Ids, Vectors]:
    """metric: of unit vectors, so that its scores tell the cosine."""
    scores = np.minimum(1 - top.scores / 2 if metric == "l2" else top.scores, 1)
    query, place = np.nonzero((scores >= least) & (top.ids >= 0) & (top.ids != asked[:, None]))
    return asked[query], top.ids[query, place], scores[query, place]


def _staying(store: Store, searcher: Searcher, roots: Ids, sizes: Ids, keep: Keep) -> np.ndarray[Any, Any]:
    """bool [n]: one of each group, and what is in none."""
    if keep == "first":
        return np.asarray(roots == np.arange(len(roots)))
    best, most = np.arange(len(roots)), np.full(len(roots), -1)
    for part, rows, _ in _members(store, searcher.parts):
        ids = np.arange(part.offset, part.offset + part.rows)
        pixels = _pixels(store, part, rows)
        for at in np.flatnonzero(sizes[roots[ids]] > 1):
            root = roots[ids[at]]
            if pixels[at] > most[root]:
                best[root], most[root] = ids[at], pixels[at]
    return np.asarray(best[roots] == np.arange(len(roots)))


def _pixels(store: Store, part: PartRange, rows: Ids) -> Ids:
    table = read_samples(store, part.name, ["row", "width", "height"]).sort_by("row")
    width, height = (table[name].fill_null(0).to_numpy().astype(np.int64) for name in ("width", "height"))
    return np.asarray((width * height)[np.searchsorted(table["row"].to_numpy(), rows)])


def _members(store: Store, parts: Parts) -> Iterator[tuple[PartRange, Ids, pa.Table]]:
    """Of each part its rows, and all but the vectors."""
    for part in parts.ranges:
        if part.gone:
            continue
        with open_part(store, parts.path(part)) as stream, pq.ParquetFile(stream, pre_buffer=False) as file:
            names = [name for name in file.schema_arrow.names if name != "embedding"]
            table = file.read(names, use_threads=False)
        yield part, table["row"].to_numpy(), table


def _write(store: Store, parts: Parts, folder: str, found: Found) -> dict[str, int]:
    """The files. Returns how many keys of what should go are not in the removal list: those that a sample which stays,
    or has come since, has too, since `remove` takes all that have it, and those that are no line of a file."""
    with scratch_folder() as scratch:
        local = {name: Path(scratch) / name for name in (GROUPS, KEEP, REMOVE)}
        going: set[str] = set()
        staying_keys: set[str] = set()
        for part, _, table in _members(store, parts):
            mine = found.stays[part.offset : part.offset + part.rows]
            going |= set(table["key"].filter(pa.array(~mine)).to_pylist())
        with ExitStack() as stack:
            file = stack.enter_context(pq.ParquetWriter(local[GROUPS], SCHEMA))
            keep = stack.enter_context(local[KEEP].open("w", encoding="utf-8"))
            for part, _, table in _members(store, parts):
                first, stop = part.offset, part.offset + part.rows
                file.write_table(_rows(table, found, first, stop))
                there = found.stays[first:stop] & found.findable.mask(first, stop)
                kept = table["key"].filter(pa.array(there)).to_pylist()
                staying_keys |= going.intersection(kept)
                keep.writelines(f"{key}\n" for key in kept)
        for _, _, table in _members(store, found.later):
            staying_keys |= going.intersection(table["key"].to_pylist())
        lines = {key for key in going if is_line(key)}
        local[REMOVE].write_text("".join(f"{key}\n" for key in sorted(lines - staying_keys)), encoding="utf-8")
        for name, path in local.items():
            store.put_atomic(f"{folder}/{name}", path)
    return {"keys_of_kept_samples_too": len(staying_keys), "keys_that_are_no_line": len(going - lines)}


def is_line(key: str) -> bool:
    """Whether a list of keys, one a line, can hold it: cut in two it would name others."""
    return bool(key) and "\n" not in key and not key.endswith("\r")


def _rows(table: pa.Table, found: Found, first: int, stop: int) -> pa.Table:
    """SCHEMA of the items of a part, whose ids these are, that are in a group."""
    grouped = np.flatnonzero(found.sizes[found.roots[first:stop]] > 1)
    table = table.take(grouped)
    columns = {
        "group": pa.array(found.roots[first + grouped]),
        "keep": pa.array(found.stays[first + grouped]),
        **{name: table[name] for name in ("shard", "row", "key")},
        "caption_index": table["caption_index"] if "caption_index" in table.column_names else pa.nulls(len(grouped)),
        "nearest": pa.array(found.nearest[first + grouped]),
    }
    return pa.table({name: columns[name] for name in SCHEMA.names}).cast(SCHEMA)


def largest_groups(store: Store, summary: dict[str, Any], count: int) -> list[list[dict[str, Any]]]:
    """Members, with key and nearest, of the groups with most of them; reads the group column, then those rows."""
    path = f"{summary['folder']}/{GROUPS}"
    whole = Store(options=store.options)
    with open_part(whole, path) as stream:
        numbers, sizes = np.unique(pq.read_table(stream, columns=["group"])["group"].to_numpy(), return_counts=True)
    wanted = numbers[np.argsort(-sizes, kind="stable")[:count]].tolist()
    with open_part(whole, path) as stream:
        table = pq.read_table(stream, filters=[("group", "in", wanted)] if wanted else None)
    members: dict[int, list[dict[str, Any]]] = {number: [] for number in wanted}
    for row in table.to_pylist() if wanted else []:
        members[row["group"]].append(row)
    return list(members.values())
