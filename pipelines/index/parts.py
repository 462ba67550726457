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
    """A part and the FAISS ids of its vectors: offset … offset + rows - 1, in the order of the part."""

    model_config = ConfigDict(frozen=True)

    name: str
    offset: int
    rows: int


class Parts(BaseModel):
    """Parts under `folder`, all or a run of them, in id order. dim: of every vector. count: vectors an item has."""

    model_config = ConfigDict(frozen=True)

    folder: str
    dim: int
    count: int = 1
    ranges: tuple[PartRange, ...]

    @property
    def rows(self) -> int:
        return sum(part.rows for part in self.ranges)

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


def list_parts(store: Store, folder: str, before: Sequence[str] = ()) -> Parts:
    """The finished parts under `folder` with the ids of their vectors; only their footers are read.

    before: names in the order of an earlier release; they keep their places, so that old ids stay
    valid, unless one of them is gone. New parts follow, sorted.
    Raises: NoVectorsError; IndexBuildError where a shard has two parts, or dimensions differ.
    """
    names = sorted(name for name in store.names(folder) if name.endswith(".parquet"))
    _require_one_each(store, folder, names)
    if set(before) <= set(names):
        names = [*before, *sorted(set(names) - set(before))]
    with ThreadPoolExecutor(FOOTER_THREADS) as pool:
        footers = list(pool.map(lambda name: _footer(store, f"{folder}/{name}"), names))
    if not any(footer.rows for footer in footers):
        raise NoVectorsError(f"{store.uri(folder)} holds no vectors", "Run `vecmill embed` first, or `vecmill status`.")
    _require_one_shape(store, folder, names, footers)
    first = footers[0]
    return Parts(folder=folder, dim=first.dim, count=first.count, ranges=tuple(_ranges(names, footers)))


def _require_one_each(store: Store, folder: str, names: list[str]) -> None:
    twice = [shard for shard, count in Counter(map(shard_of, names)).items() if count > 1]
    if twice:
        raise IndexBuildError(
            f"{store.uri(folder)} holds several parts of {len(twice)} shards ({', '.join(twice[:3])})",
            "An embed run is replacing them, or died while it did: run the same `vecmill embed` again, then index.",
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


def _require_one_shape(store: Store, folder: str, names: list[str], footers: list[Footer]) -> None:
    for name, footer in zip(names, footers, strict=True):
        if (footer.dim, footer.count) != (footers[0].dim, footers[0].count):
            raise IndexBuildError(
                f"{store.uri(folder)}/{name} holds vectors of {footer.dim} dimensions, {names[0]} of {footers[0].dim}",
                "Parts of two encoders do not mix in one index: remove the folder's strangers.",
            )


def _ranges(names: Iterable[str], footers: Iterable[Footer]) -> Iterator[PartRange]:
    offset = 0
    for name, footer in zip(names, footers, strict=True):
        yield PartRange(name=name, offset=offset, rows=footer.rows)
        offset += footer.rows


def vectors(column: pa.ChunkedArray | pa.Array, dim: int) -> Vectors:
    """float32 [n, dim] from a fixed_size_list<half|float>[dim] column; of several an item, all, one after the other."""
    chunks = column.chunks if isinstance(column, pa.ChunkedArray) else [column]
    flat = [chunk.flatten(recursive=True).to_numpy(zero_copy_only=False).reshape(-1, dim) for chunk in chunks]
    found: Vectors = np.concatenate([np.empty((0, dim), np.float32), *flat]).astype(np.float32, copy=False)
    return found


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
    """(id of the first, float32 [n, dim]) for consecutive vectors of the parts, one batch at a time; of several an
    item, [n * count, dim].

    A batch is at most BATCH_BYTES and never spans parts. Raises: IndexBuildError for a part that
    cannot be read.
    """
    rows = max(1, BATCH_BYTES // (4 * parts.dim * parts.count))
    for part in parts.ranges:
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
            file.read_row_group(int(group), columns, use_threads=False).take(
                positions[group_of == group] - starts[group]
            )
            for group in np.unique(group_of)
        ]
        return pa.concat_tables(found or [file.schema_arrow.empty_table()])


def pick(parts: Parts, count: int, seed: int) -> list[Ids]:
    """For each part the sorted positions of a uniform sample of `count` vectors (all, where there are fewer).

    A stratified draw: each part gives its share to within one, at random positions, so that every
    vector is as likely as any other and no part is left out for being last. Needs memory for the
    sample alone, and gives the same for the same seed and parts.
    """
    count = min(count, parts.rows)
    shift = np.random.default_rng([seed, 0]).random()
    ends = [part.offset + part.rows for part in parts.ranges]
    bounds = [0, *(int(end * count / parts.rows + shift) for end in ends)]
    bounds[-1] = count
    shares = [min(part.rows, stop - start) for part, (start, stop) in zip(parts.ranges, pairwise(bounds), strict=True)]
    return [
        np.sort(np.random.default_rng([seed, at]).choice(part.rows, share, replace=False))
        for at, (part, share) in enumerate(zip(parts.ranges, shares, strict=True), start=1)
    ]
