"""The items of an output as a stream of tiles: ids, what they belong to, and their vectors."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
import pyarrow.parquet as pq
from numpy.typing import NDArray

from pipelines.contracts import Modality
from pipelines.errors import ConfigError
from pipelines.evaluate.groups import OUTSIDE, Groups
from pipelines.index.parts import Ids, Parts, Vectors, embeddings_folder, list_parts, open_part, take, unit, vectors
from pipelines.index.removed import not_removed
from pipelines.index.selection import Selection
from pipelines.record import read_record
from pipelines.storage import Store
from pipelines.takedowns import read_takedowns

CODES_AT_ONCE = 2**18


@dataclass(frozen=True)
class Tile:
    """Some items: ids, int64 [n] ascending; codes, int64 [n], of Groups; vectors, float32 [n, dim]."""

    ids: Ids
    codes: Ids
    vectors: Vectors

    def __len__(self) -> int:
        return len(self.ids)

    def of(self, which: NDArray[Any] | slice) -> Tile:
        return Tile(self.ids[which], self.codes[which], self.vectors[which])

    def unit(self) -> Tile:
        """The same with vectors of length 1, whose inner products are cosines."""
        return Tile(self.ids, self.codes, unit(self.vectors))


class ItemPlace(NamedTuple):
    """Where an item's sample is told of. caption_index: which caption the vector is of, None of an image."""

    part: str
    row: int
    caption_index: int | None = None


class Items(Protocol):
    """Items that can be gone through any number of times, those that are OUTSIDE left out."""

    @property
    def dim(self) -> int: ...

    def tiles(self, rows: int) -> Iterator[Tile]:
        """At most `rows` items at a time."""

    def codes(self) -> Iterator[tuple[Ids, Ids]]:
        """(ids, codes) without the vectors, which are not read."""


@dataclass(frozen=True)
class StoredItems:
    """Those of an output's parts, `findable` ones alone; memory for one tile. Ids are FAISS ids where the parts are a
    release's."""

    store: Store
    parts: Parts
    groups: Groups
    findable: Selection | None = None

    @property
    def dim(self) -> int:
        return self.parts.dim

    def tiles(self, rows: int) -> Iterator[Tile]:
        for ids, codes, found in self._batches(rows, ["row", "embedding"]):
            kept = codes != OUTSIDE
            if kept.any():
                yield Tile(ids[kept], codes[kept], found[kept])

    def codes(self) -> Iterator[tuple[Ids, Ids]]:
        for ids, codes, _ in self._batches(CODES_AT_ONCE, ["row"]):
            kept = codes != OUTSIDE
            if kept.any():
                yield ids[kept], codes[kept]

    def _batches(self, rows: int, columns: list[str]) -> Iterator[tuple[Ids, Ids, Vectors]]:
        for part in self.parts.ranges:
            if part.gone:
                continue
            first, path = part.offset, self.parts.path(part)
            with open_part(self.store, path) as stream, pq.ParquetFile(stream, pre_buffer=False) as file:
                for batch in file.iter_batches(rows, columns=columns, use_threads=False):
                    codes = self.groups.codes(part.name, batch["row"].to_numpy())
                    if self.findable:
                        codes = np.where(self.findable.mask(first, first + len(codes)), codes, OUTSIDE)
                    wanted = "embedding" in columns
                    found = vectors(batch["embedding"], self.dim) if wanted else np.empty((0, self.dim), np.float32)
                    yield np.arange(first, first + len(codes)), codes, found
                    first += len(codes)


@dataclass(frozen=True)
class UnitItems:
    """Other items, with vectors of length 1."""

    items: Items

    @property
    def dim(self) -> int:
        return self.items.dim

    def tiles(self, rows: int) -> Iterator[Tile]:
        return (tile.unit() for tile in self.items.tiles(rows))

    def codes(self) -> Iterator[tuple[Ids, Ids]]:
        return self.items.codes()


@dataclass(frozen=True)
class HeldItems:
    """Items in memory."""

    held: Tile

    @property
    def dim(self) -> int:
        return int(self.held.vectors.shape[1])

    def tiles(self, rows: int) -> Iterator[Tile]:
        for at in range(0, len(self.held), rows):
            yield self.held.of(slice(at, at + rows))

    def codes(self) -> Iterator[tuple[Ids, Ids]]:
        yield self.held.ids, self.held.codes


def stored(store: Store, encoder: str, modality: Modality, groups: Groups) -> StoredItems:
    """Every item there is now, but for what was taken down. Raises: NoVectorsError; ConfigError where an item has
    several vectors."""
    parts = list_parts(store, embeddings_folder(encoder, modality))
    require_one_vector(parts)
    return StoredItems(store, parts, groups, not_removed(store, parts, read_takedowns(store)))


def is_unit(store: Store, encoder: str) -> bool:
    """Whether the vectors were written with length 1, so that their inner products are cosines already."""
    return read_record(store).encoders[encoder].encoder_spec(store.options).normalize


def require_one_vector(parts: Parts) -> None:
    if parts.count > 1:
        raise ConfigError(
            f"{parts.folder} has {parts.count} vectors an item, which are compared by max-similarity",
            "Evaluate a pooling of one vector: ?pool=mean_norm, ?pool=mean_raw or ?pool=first.",
        )


def draw(items: Items, count: int | None, seed: int) -> tuple[Ids, int]:
    """Ids, ascending, of a seeded sample of `count` items, all if None, and how many items there are.

    Every item gets a random number, and those with the smallest are taken: one pass, memory for the sample.
    """
    random = np.random.default_rng([seed, 7])
    best, numbers, total = np.empty(0, np.int64), np.empty(0), 0
    for ids, _ in items.codes():
        best, numbers = np.concatenate([best, ids]), np.concatenate([numbers, random.random(len(ids))])
        total += len(ids)
        if count is not None and len(best) > count:
            kept = np.argpartition(numbers, count)[:count]
            best, numbers = best[kept], numbers[kept]
    return np.sort(best), total


def collect(items: Items, ids: Ids, rows: int) -> Tile:
    """The items of these ids, ascending; holds them and one tile."""
    found = Tile(ids, np.full(len(ids), OUTSIDE), np.empty((len(ids), items.dim), np.float32))
    for tile in items.tiles(rows):
        start, stop = np.searchsorted(ids, [tile.ids[0], tile.ids[-1] + 1])
        at = np.searchsorted(tile.ids, ids[start:stop])
        found.codes[start:stop], found.vectors[start:stop] = tile.codes[at], tile.vectors[at]
    return found


def codes_of(items: Items, ids: Ids) -> Ids:
    """int64, in the shape of `ids`: the code of each, OUTSIDE for -1 and for what is left out. One pass."""
    wanted, inverse = np.unique(ids, return_inverse=True)
    codes = np.full(len(wanted), OUTSIDE)
    for known, of_known in items.codes():
        start, stop = np.searchsorted(wanted, [known[0], known[-1] + 1])
        at = np.minimum(np.searchsorted(known, wanted[start:stop]), len(known) - 1)
        codes[start:stop] = np.where(known[at] == wanted[start:stop], of_known[at], OUTSIDE)
    return codes[inverse].reshape(ids.shape)


def first_with(items: Items, codes: Ids) -> Ids:
    """int64 [n]: the least id of each code, OUTSIDE where there is none. One pass."""
    wanted, inverse = np.unique(codes, return_inverse=True)
    none = np.iinfo(np.int64).max
    found = np.full(len(wanted), none)
    for ids, known in items.codes():
        at = np.minimum(np.searchsorted(wanted, known), len(wanted) - 1)
        hits = wanted[at] == known
        np.minimum.at(found, at[hits], ids[hits])
    return np.where(found == none, OUTSIDE, found)[inverse]


def places_of(items: StoredItems, ids: Ids) -> list[ItemPlace]:
    """Of each id, in their order."""
    found: dict[int, ItemPlace] = {}
    for part in items.parts.ranges:
        mine = np.unique(ids[(ids >= part.offset) & (ids < part.offset + part.rows)])
        if len(mine):
            # Of captions alone there is the second column.
            table = take(items.store, items.parts.path(part), mine - part.offset, ["row", "caption_index"])
            found |= {
                id: ItemPlace(part.name, **place) for id, place in zip(mine.tolist(), table.to_pylist(), strict=True)
            }
    return [found[id] for id in ids.tolist()]


def collect_any(items: Items, ids: Ids, rows: int) -> Tile:
    """`collect` for ids in any order, some perhaps twice."""
    unique, inverse = np.unique(ids, return_inverse=True)
    return collect(items, unique, rows).of(inverse)
