"""The parts an index is made of: their order, their footers, and their vectors a batch at a time."""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict

from pipelines.errors import IndexBuildError, VecmillError
from pipelines.storage import Store

Vectors = NDArray[np.float32]
Ids = NDArray[np.int64]

FOOTER_THREADS = 32
BATCH_BYTES = 32 * 2**20


class ReplacedError(IndexBuildError):
    """A part that a release or listing names, or its shard's samples, is no longer there."""


class NoVectorsError(IndexBuildError):
    """A folder of parts without a vector in it."""


class PartRange(BaseModel):
    """A part and the FAISS ids of its vectors: offset … offset + rows - 1, in the order of the part.

    gone: replaced or pruned since; its ids stand for nothing any more, and go to nobody else.
    """

    model_config = ConfigDict(frozen=True)

    name: str
    offset: int
    rows: int
    gone: bool = False


class Parts(BaseModel):
    """Parts under `folder`, all or a run of them, in id order. dim: of every vector. count: vectors an item has.

    rows: ids, of parts that are gone too. standing: items that are there.
    """

    model_config = ConfigDict(frozen=True)

    folder: str
    dim: int
    count: int = 1
    ranges: tuple[PartRange, ...]

    @property
    def rows(self) -> int:
        return sum(part.rows for part in self.ranges)

    @property
    def standing(self) -> int:
        return sum(part.rows for part in self.ranges if not part.gone)

    @property
    def gone(self) -> list[tuple[int, int]]:
        """(first, stop) of the ids of each part that is gone."""
        return [(part.offset, part.offset + part.rows) for part in self.ranges if part.gone and part.rows]

    def ids_at(self, positions: Ids) -> Ids:
        """int64 ids of vectors by their positions among all that stand."""
        there = [part for part in self.ranges if not part.gone]
        ends = np.cumsum([part.rows for part in there])
        of = np.searchsorted(ends, positions, side="right")
        shift = np.array([part.offset for part in there]) - (ends - np.array([part.rows for part in there]))
        return np.asarray(positions + shift[of], np.int64)

    def are_gone(self, ids: Ids) -> NDArray[np.bool_]:
        """Which of the int64 ids, all of these parts or -1 for none, are of parts that are gone."""
        starts = np.array([part.offset for part in self.ranges])
        gone = np.array([part.gone for part in self.ranges])
        return np.asarray((ids >= 0) & gone[np.searchsorted(starts, np.maximum(ids, 0), side="right") - 1])

    def run(self, start: int, stop: int) -> Parts:
        return self.model_copy(update={"ranges": self.ranges[start:stop]})

    def path(self, part: PartRange) -> str:
        return f"{self.folder}/{part.name}"


@dataclass(frozen=True)
class Footer:
    rows: int
    dim: int
    count: int


def embeddings_folder(encoder: str, modality: str) -> str:
    return f"embeddings/{encoder}/{modality}"


def shard_of(name: str) -> str:
    """The shard's id, from `part-<shard>.<version>.<generation>.parquet`."""
    return name.removeprefix("part-").split(".")[0]


def version_of(name: str) -> str:
    """The shard's version, from the same."""
    return name.split(".")[1]


def list_parts(store: Store, folder: str, before: Sequence[str] = ()) -> Parts:
    """The finished parts under `folder` with the ids of their vectors; only their footers are read.

    before: names in the order of an earlier release; they keep their places, so that old ids stay
    valid, unless one of them is gone. New parts follow, sorted.
    Raises: NoVectorsError; IndexBuildError where a shard has two parts, or dimensions differ.
    """
    names = _names(store, folder)
    if set(before) <= set(names):
        names = [*before, *sorted(set(names) - set(before))]
    footers = _footers(store, folder, names)
    if not any(footer.rows for footer in footers):
        raise _no_vectors(store, folder)
    _require_one_shape(store, folder, names, footers)
    first = footers[0]
    return Parts(folder=folder, dim=first.dim, count=first.count, ranges=tuple(_ranges(names, footers)))


def list_grown(store: Store, known: Parts) -> Parts:
    """`known` with the parts that are there now: all keep their ids, those that are gone are marked, new ones follow.

    Only the new ones' footers are read. Raises: as `list_parts`.
    """
    names = _names(store, known.folder)
    there = set(names)
    old = [part.model_copy(update={"gone": part.gone or part.name not in there}) for part in known.ranges]
    # A part that was gone and has come back gets new ids: what its old ones stood for may be something else.
    standing = {part.name for part in old if not part.gone}
    new = [name for name in names if name not in standing]
    footers = _footers(store, known.folder, new)
    _require_one_shape(store, known.folder, new, footers, Footer(0, known.dim, known.count))
    grown = known.model_copy(update={"ranges": (*old, *_ranges(new, footers, known.rows))})
    if not grown.standing:
        raise _no_vectors(store, known.folder)
    return grown


def _names(store: Store, folder: str) -> list[str]:
    names = sorted(name for name in store.names(folder) if name.endswith(".parquet"))
    _require_one_each(store, folder, names)
    return names


def _footers(store: Store, folder: str, names: list[str]) -> list[Footer]:
    with ThreadPoolExecutor(FOOTER_THREADS) as pool:
        return list(pool.map(lambda name: _footer(store, f"{folder}/{name}"), names))


def _no_vectors(store: Store, folder: str) -> NoVectorsError:
    return NoVectorsError(f"{store.uri(folder)} holds no vectors", "Run `vecmill embed` first, or `vecmill status`.")


def _require_one_each(store: Store, folder: str, names: list[str]) -> None:
    twice = [shard for shard, count in Counter(map(shard_of, names)).items() if count > 1]
    if twice:
        raise IndexBuildError(
            f"{store.uri(folder)} holds several parts of {len(twice)} shards ({', '.join(twice[:3])})",
            "An embed run or `vecmill remove --compact` is replacing them, or died while it did: run the same again, "
            "then index.",
        )


@contextmanager
def open_part(store: Store, path: str) -> Iterator[BinaryIO]:
    """The bytes of a part, until the reading is done.

    Raises: ReplacedError where it is gone, IndexBuildError where it turns out to be damaged.
    """
    try:
        with store.open(path) as stream:
            yield stream
    except VecmillError:
        raise
    except FileNotFoundError:
        raise ReplacedError(
            f"{store.uri(path)} is gone: the output has changed since it was listed or indexed",
            "Run `vecmill index` again.",
        ) from None
    except (pa.ArrowException, OSError) as error:
        raise IndexBuildError(
            f"{store.uri(path)} is damaged: {error}",
            "Move it and its commit away, run the same `vecmill embed` again, then index.",
        ) from None


def _footer(store: Store, path: str) -> Footer:
    with open_part(store, path) as stream, pq.ParquetFile(stream) as file:
        kind = file.schema_arrow.field("embedding").type
        rows = file.metadata.num_rows
        several = pa.types.is_fixed_size_list(kind.value_type)
        return Footer(rows, kind.value_type.list_size, kind.list_size) if several else Footer(rows, kind.list_size, 1)


def _require_one_shape(
    store: Store, folder: str, names: list[str], footers: list[Footer], like: Footer | None = None
) -> None:
    """like: of the other parts, else of the first of these."""
    for name, footer in zip(names, footers, strict=True):
        first = like or footers[0]
        if (footer.dim, footer.count) != (first.dim, first.count):
            others = "the release" if like else names[0]
            raise IndexBuildError(
                f"{store.uri(folder)}/{name} holds vectors of {footer.dim} dimensions, {others} of {first.dim}",
                "Parts of two encoders do not mix in one index: remove the folder's strangers.",
            )


def _ranges(names: Iterable[str], footers: Iterable[Footer], offset: int = 0) -> Iterator[PartRange]:
    for name, footer in zip(names, footers, strict=True):
        yield PartRange(name=name, offset=offset, rows=footer.rows)
        offset += footer.rows


def vectors(column: pa.ChunkedArray | pa.Array, dim: int) -> Vectors:
    """float32 [n, dim] from a fixed_size_list<half|float>[dim] column; of several an item, all, one after the other."""
    chunks = column.chunks if isinstance(column, pa.ChunkedArray) else [column]
    flat = [chunk.flatten(recursive=True).to_numpy(zero_copy_only=False).reshape(-1, dim) for chunk in chunks]
    found: Vectors = np.concatenate([np.empty((0, dim), np.float32), *flat]).astype(np.float32, copy=False)
    return found


def unit(vectors: Vectors) -> Vectors:
    """float32 [..., dim], each vector of length 1, or 0 where it is nothing but zeros."""
    lengths = np.linalg.norm(vectors, axis=-1, keepdims=True)
    return np.asarray(vectors / np.where(lengths > 0, lengths, 1), np.float32)


def part_of(parts: Parts, id: int) -> PartRange:
    return parts.ranges[bisect_right(parts.ranges, id, key=lambda part: part.offset) - 1]


def require_finite(store: Store, path: str, found: Vectors) -> None:
    """Raises: IndexBuildError for NaN and infinity, which `embed` rejects and an index would never find again."""
    if not np.isfinite(found).all():
        raise IndexBuildError(
            f"{store.uri(path)} holds vectors that are not finite, which vecmill never writes",
            "Move it and its commit away, run the same `vecmill embed` again, then index.",
        )


def batches(store: Store, parts: Parts) -> Iterator[tuple[int, Vectors]]:
    """(id of the first, float32 [n, dim]) for consecutive vectors of the parts that stand, one batch at a time; of
    several an item, [n * count, dim].

    A batch is at most BATCH_BYTES and never spans parts. Raises: IndexBuildError for a part that
    cannot be read.
    """
    rows = max(1, BATCH_BYTES // (4 * parts.dim * parts.count))
    for part in parts.ranges:
        if part.gone:
            continue
        first = part.offset
        with open_part(store, parts.path(part)) as stream, pq.ParquetFile(stream, pre_buffer=False) as file:
            for batch in file.iter_batches(rows, columns=["embedding"], use_threads=False):
                yield first, vectors(batch.column(0), parts.dim)
                first += batch.num_rows


def take(store: Store, path: str, positions: Ids, columns: list[str] | None = None) -> pa.Table:
    """The rows at the sorted int64 `positions` of a Parquet file: reads only their row groups, one at a time.

    Raises: ReplacedError where it is gone, IndexBuildError where it is damaged.
    """
    with open_part(store, path) as stream, pq.ParquetFile(stream, pre_buffer=False) as file:
        sizes = [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)]
        starts = np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)])
        group_of = np.searchsorted(starts, positions, side="right") - 1
        found = [
            _of_group(file, int(group), positions[group_of == group] - starts[group], columns)
            for group in np.unique(group_of)
        ]
        return pa.concat_tables(found or [file.schema_arrow.empty_table()])


def _of_group(file: pq.ParquetFile, group: int, positions: Ids, columns: list[str] | None) -> pa.Table:
    """Of a row group the rows at the sorted positions. What lies behind the last of them is not decoded."""
    rows = int(positions[-1]) + 1
    head = next(file.iter_batches(rows, row_groups=[group], columns=columns, use_threads=False))
    return pa.Table.from_batches([head]).take(positions)


def pick(parts: Parts, count: int, seed: int) -> list[Ids]:
    """For each part the sorted positions of a uniform sample of `count` vectors (all, where there are fewer).

    A stratified draw: each part gives its share to within one, at random positions, so that every
    vector is as likely as any other and no part is left out for being last. Needs memory for the
    sample alone, and gives the same for the same seed and parts.
    """
    count = min(count, parts.rows)
    if not count:
        return [np.empty(0, np.int64)] * len(parts.ranges)
    shift = np.random.default_rng([seed, 0]).random()
    ends = np.cumsum([part.rows for part in parts.ranges]).tolist()
    bounds = [0, *(int(end * count / parts.rows + shift) for end in ends)]
    bounds[-1] = count
    shares = [min(part.rows, stop - start) for part, (start, stop) in zip(parts.ranges, pairwise(bounds), strict=True)]
    return [
        np.sort(np.random.default_rng([seed, at]).choice(part.rows, share, replace=False))
        for at, (part, share) in enumerate(zip(parts.ranges, shares, strict=True), start=1)
    ]
