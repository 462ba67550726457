"""Parquet files of image bytes (plain, or Hugging Face's struct) or of paths and URLs, with captions.

A shard is a file, or a run of its row groups where it has more rows than `rows_per_shard`.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from io import BufferedReader
from itertools import count
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.config import ReadConfig
from pipelines.contracts import Entry, Sample, Shard
from pipelines.errors import InputError, StorageError
from pipelines.sources.arrow import is_bytes, values_of
from pipelines.sources.columns import Columns, columns_of, key_in, sample_of
from pipelines.sources.fetch import fetch_image, in_order
from pipelines.sources.identity import object_version, shard_id
from pipelines.sources.kinds import basename
from pipelines.sources.members import MAX_FIELD_BYTES, rejected_row
from pipelines.sources.text import Fault, printable
from pipelines.storage import Store
from pipelines.stream import READ_BLOCK_BYTES

FOOTER_THREADS = 16
CUT_ABOVE_BYTES = 64 * 2**20
_BATCH_ROWS = 32
_MAX_GROUP_BYTES = 128 * 2**20
# pyarrow raises OSError, ValueError (ArrowInvalid) and others for bytes that are not Parquet.
_TORN = (pa.ArrowException, OSError, ValueError)


class TornError(Exception):
    """The bytes are there, and are not Parquet."""


def plan(entries: list[Entry], settings: ReadConfig, store: Store) -> list[Shard]:
    """Small files whole, by the listing alone; the footers of large ones are read to cut them.

    Raises: InputError where the first file has neither an image nor a caption column.
    """
    _require_columns(entries[0], settings, store)
    with ThreadPoolExecutor(FOOTER_THREADS) as pool:
        return [
            shard for shards in pool.map(lambda entry: _pieces(entry, settings, store), entries) for shard in shards
        ]


def samples(shard: Shard, settings: ReadConfig, store: Store) -> Iterator[Sample]:
    """In the order of the file. Rows of a row group that cannot be read are rejects, one each."""
    rows = _rows(shard, settings, store)
    yield from in_order(lambda row: fetch_image(row[0], row[1], shard.uri, store, settings.max_image_bytes), rows)


@contextmanager
def _told_from_storage() -> Iterator[None]:
    """Raises: TornError for what pyarrow says of bad bytes; what the store says passes as it is."""
    try:
        yield
    except (StorageError, FileNotFoundError):
        raise
    except _TORN as error:
        raise TornError(printable(str(error))) from error


def _require_columns(entry: Entry, settings: ReadConfig, store: Store) -> None:
    try:
        with store.open(entry.uri) as file, _told_from_storage():
            names = pq.ParquetFile(file).schema_arrow.names
    except TornError:
        return
    if problem := _missing_columns(names, settings):
        raise InputError(f"{entry.uri} {problem}", "Name them with read.image_column and read.caption_column.")


def _missing_columns(names: list[str], settings: ReadConfig) -> str:
    columns = columns_of(names, settings)
    absent = {settings.image_column, settings.caption_column, settings.key_column} - {None, "", *names}
    if absent:
        return f"has no column {', '.join(sorted(map(str, absent)))}; it has: {', '.join(names)}"
    if columns.image is None and columns.caption is None:
        return f"has no column known as an image or a caption; it has: {', '.join(names)}"
    return ""


def _pieces(entry: Entry, settings: ReadConfig, store: Store) -> list[Shard]:
    whole = Shard(shard_id(entry.uri), entry.uri, "parquet", object_version(entry), entry.bytes)
    if entry.bytes <= CUT_ABOVE_BYTES:
        return [whole]
    try:
        with store.open(entry.uri) as file, _told_from_storage():
            footer = pq.ParquetFile(file).metadata
    except TornError:
        return [whole]
    bounds = cut([footer.row_group(i).num_rows for i in range(footer.num_row_groups)], settings.rows_per_shard)
    if len(bounds) < 2:
        return [whole]
    return [_piece(entry, footer, number, part) for number, part in enumerate(bounds)]


def _piece(entry: Entry, footer: Any, number: int, bounds: tuple[int, int]) -> Shard:
    size = sum(_group_bytes(footer, i) for i in range(*bounds))
    id_ = shard_id(entry.uri, f"p{number:04d}")
    return Shard(id_, entry.uri, "parquet", object_version(entry, bounds), size, row_groups=bounds)


def cut(rows: list[int], rows_per_shard: int) -> list[tuple[int, int]]:
    """Half-open runs of row groups, each of as many as fit in rows_per_shard and of one at least."""
    bounds: list[tuple[int, int]] = []
    start = total = 0
    for index, size in enumerate(rows):
        if index > start and total + size > rows_per_shard:
            bounds.append((start, index))
            start, total = index, 0
        total += size
    return [*bounds, (start, len(rows))] if rows else []


def _open(stream: BufferedReader) -> Any:
    """Reads column chunks whole, one after the other as they lie, unless a row group is too large for memory."""
    footer = pq.read_metadata(stream)
    largest = max((_group_bytes(footer, i) for i in range(footer.num_row_groups)), default=0)
    buffer_bytes = READ_BLOCK_BYTES if largest > _MAX_GROUP_BYTES else 0
    return pq.ParquetFile(stream, metadata=footer, buffer_size=buffer_bytes, pre_buffer=False)


def _group_bytes(footer: Any, index: int) -> int:
    group = footer.row_group(index)
    return sum(group.column(i).total_compressed_size for i in range(group.num_columns))


def _rows(shard: Shard, settings: ReadConfig, store: Store) -> Iterator[tuple[Sample, str | None]]:
    with store.open(shard.uri) as stream:
        try:
            with _told_from_storage():
                file = _open(stream)
                names = file.schema_arrow.names
        except TornError as error:
            yield rejected_row(basename(shard.uri), shard.uri, Fault("corrupt_shard", str(error))), None
            return
        if problem := _missing_columns(names, settings):
            yield rejected_row(basename(shard.uri), shard.uri, Fault("wrong_columns", printable(problem))), None
            return
        first, last = shard.row_groups or (0, file.num_row_groups)
        start = sum(file.metadata.row_group(i).num_rows for i in range(first))
        for group in range(first, last):
            size = file.metadata.row_group(group).num_rows
            yield from _group_rows(file, group, range(start, start + size), shard, settings)
            start += size


def _group_rows(
    file: Any, group: int, numbers: range, shard: Shard, settings: ReadConfig
) -> Iterator[tuple[Sample, str | None]]:
    """Rows of one row group. numbers: the rows' numbers in the file."""
    columns = columns_of(file.schema_arrow.names, settings)
    left = iter(numbers)
    for row in _readable(file, group, columns):
        if isinstance(row, Fault):
            yield from ((rejected_row(str(number), shard.uri, row), None) for number in left)
        else:
            yield _sample(row, next(left), columns, group, shard, settings)


def _sample(
    row: dict[str, Any], number: int, columns: Columns, group: int, shard: Shard, settings: ReadConfig
) -> tuple[Sample, str | None]:
    sample, reference = sample_of(row, columns, key_in(row, columns) or str(number), settings)
    if reference is None:
        sample.uri, sample.row_group = shard.uri, group
    return sample, reference


def _readable(file: Any, group: int, columns: Columns) -> Iterator[dict[str, Any] | Fault]:
    """The group's rows, a few at a time; where its bytes are bad, a Fault and no more."""
    skipped = _large_fields(file, group, columns)
    wanted = [name for name in file.schema_arrow.names if name not in skipped] if skipped else None
    batches = file.iter_batches(_BATCH_ROWS, row_groups=[group], columns=wanted, use_threads=False)
    for number in count():
        try:
            with _told_from_storage():
                batch = next(batches, None)
        except TornError as error:
            yield Fault("corrupt_row_group", f"row group {group}, batch {number}: {error}")
            return
        if batch is None:
            return
        for values in zip(*map(values_of, batch.columns), strict=True):
            row = dict(zip(batch.schema.names, values, strict=True))
            yield ({"_skipped": skipped} if skipped else {}) | row


def _large_fields(file: Any, group: int, columns: Columns) -> list[str]:
    """Columns of bytes whose mean in the group is too large for metadata: they are not even read."""
    footer = file.metadata.row_group(group)
    chunks = [footer.column(i) for i in range(footer.num_columns)]
    large = {c.path_in_schema for c in chunks if c.total_uncompressed_size > MAX_FIELD_BYTES * footer.num_rows}
    fields = [field.name for field in file.schema_arrow if is_bytes(field.type) and field.name not in columns]
    return [name for name in fields if name in large]
