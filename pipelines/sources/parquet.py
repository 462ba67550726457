"""Parquet files of image bytes (plain, or Hugging Face's struct) or of paths and URLs, with captions.

A shard is a file, or a run of its row groups where it has more rows than `rows_per_shard`.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from io import BufferedReader
from itertools import count, islice
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.config import ReadConfig
from pipelines.contracts import Entry, Sample, Shard
from pipelines.errors import InputError, StorageError
from pipelines.sources.arrow import is_bytes, values_of
from pipelines.sources.columns import Columns, columns_of, key_in, reference_in, sample_of
from pipelines.sources.fetch import PROBED_REFERENCES, fetch_image, in_order, require_allowed
from pipelines.sources.identity import object_version, shard_id
from pipelines.sources.kinds import basename
from pipelines.sources.members import MAX_FIELD_BYTES, rejected_row
from pipelines.sources.text import Fault, printable
from pipelines.storage import Store
from pipelines.stream import READ_BLOCK_BYTES

FOOTER_THREADS = 16
CUT_ABOVE_BYTES = 64 * 2**20
_BATCH_ROWS, _BATCH_BYTES = 32, 64 * 2**20
_PROBED_FILES = 8
_PROBE_BYTES = 2**16
_MANY_ROWS = 2**20
_MAX_GROUP_BYTES = 128 * 2**20
# pyarrow raises OSError, ValueError (ArrowInvalid) and others for bytes that are not Parquet.
_TORN = (pa.ArrowException, OSError, ValueError)


class TornError(Exception):
    """The bytes are there, and are not Parquet."""


def plan(entries: list[Entry], settings: ReadConfig, store: Store) -> list[Shard]:
    """Small files whole, by the listing alone; the footers of large ones are read to cut them.

    Raises: InputError where none of the first few files has an image or a caption column, or where the first
    images of one are all named where they may not be.
    """
    _require_columns(entries, settings, store)
    with ThreadPoolExecutor(FOOTER_THREADS) as pool:
        return [
            shard for shards in pool.map(lambda entry: _pieces(entry, settings, store), entries) for shard in shards
        ]


def samples(shard: Shard, settings: ReadConfig, store: Store) -> Iterator[Sample]:
    """In the order of the file. Rows of a row group that cannot be read are rejects, one each."""
    rows = _rows(shard, settings, store)
    yield from in_order(lambda row: fetch_image(row[0], row[1], shard.uri, settings, store), rows)


@contextmanager
def _told_from_storage() -> Iterator[None]:
    """Raises: TornError for what pyarrow says of bad bytes; what the store says passes as it is."""
    try:
        yield
    except (StorageError, FileNotFoundError):
        raise
    except _TORN as error:
        raise TornError(printable(str(error))) from error


def _require_columns(entries: list[Entry], settings: ReadConfig, store: Store) -> None:
    """A file of other columns is a reject among good ones; where there are only such, the settings are wrong."""
    problem = ""
    for entry in entries[:_PROBED_FILES]:
        try:
            with store.open(entry.uri, listed=True) as stream, _told_from_storage():
                file = pq.ParquetFile(stream, buffer_size=_PROBE_BYTES, pre_buffer=False)
                names = file.schema_arrow.names
                references = _first_references(file, columns_of(names, settings).image)
        except TornError:
            continue
        missing = _missing_columns(names, settings)
        if not missing:
            require_allowed(references, entry.uri, settings.allow)
            return
        problem = problem or f"{entry.uri} {missing}"
    if problem:
        raise InputError(problem, "Name them with read.image_column and read.caption_column.")


def _first_references(file: Any, image: str | None) -> list[str]:
    """The paths and URLs of the first few rows' images, none where one of them has bytes."""
    if image is None or not file.num_row_groups:
        return []
    references: list[str] = []
    for batch in islice(file.iter_batches(1, row_groups=[0], columns=[image], use_threads=False), PROBED_REFERENCES):
        (value,) = values_of(batch.column(0))
        if isinstance(value, bytes) or (isinstance(value, dict) and value.get("bytes")):
            return []
        if reference := reference_in(value):
            references.append(reference)
    return references


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
        with store.open(entry.uri, listed=True) as file, _told_from_storage():
            footer = pq.ParquetFile(file).metadata
    except TornError:
        return [whole]
    rows = [footer.row_group(i).num_rows for i in range(footer.num_row_groups)]
    bounds = cut(rows, settings.rows_per_shard)
    if len(bounds) < 2:
        return [whole]
    return [_piece(entry, rows, number, part) for number, part in enumerate(bounds)]


def _piece(entry: Entry, rows: list[int], number: int, bounds: tuple[int, int]) -> Shard:
    size = entry.bytes * sum(rows[slice(*bounds)]) // sum(rows)
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
    """As unpacked. The sizes of its columns are better left unasked: pyarrow ends the process where theirs are bad."""
    return int(footer.row_group(index).total_byte_size)


def _rows(shard: Shard, settings: ReadConfig, store: Store) -> Iterator[tuple[Sample, str | None]]:
    with store.open(shard.uri, listed=True) as stream:
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
    """Rows of one row group. numbers: the rows' numbers in the file, as the footer has them."""
    columns = columns_of(file.schema_arrow.names, settings)
    found = 0
    fault = Fault("corrupt_row_group", f"row group {group} ends early")
    for row in _readable(file, group, columns):
        if isinstance(row, Fault):
            fault = row
        else:
            yield _sample(row, numbers.start + found, columns, group, shard, settings)
            found += 1
    yield from ((sample, None) for sample in _lost(numbers[found:], fault, shard))


def _lost(numbers: range, fault: Fault, shard: Shard) -> Iterator[Sample]:
    """A reject a row; one for all where a broken footer claims more rows than the file could well have."""
    if len(numbers) > max(shard.bytes, _MANY_ROWS):
        numbers, fault = numbers[:1], Fault(fault.reason, f"{len(numbers)} rows: {fault.detail}")
    for number in numbers:
        yield rejected_row(str(number), shard.uri, fault)


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
    batches = file.iter_batches(_batch_rows(file, group), row_groups=[group], columns=wanted, use_threads=False)
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


def _batch_rows(file: Any, group: int) -> int:
    """The fewer, the larger the group: a value that is in its dictionary once may be that of every row."""
    return max(1, min(_BATCH_ROWS, _BATCH_BYTES // max(1, _group_bytes(file.metadata, group))))


def _large_fields(file: Any, group: int, columns: Columns) -> list[str]:
    """Columns of bytes whose mean in the group is too large for metadata: they are not even read."""
    footer = file.metadata.row_group(group)
    most = MAX_FIELD_BYTES * footer.num_rows
    fields = [field.name for field in file.schema_arrow if is_bytes(field.type) and field.name not in columns]
    if not fields or footer.total_byte_size <= most or not _is_sound(file, group, fields):
        return []
    chunks = {file.schema.column(i).path: i for i in range(footer.num_columns)}
    return [name for name in fields if footer.column(chunks[name]).total_uncompressed_size > most]


def _is_sound(file: Any, group: int, fields: list[str]) -> bool:
    """Whether the first row can be had. Where not, asking the footer for a column's size would end the process."""
    try:
        with _told_from_storage():
            next(file.iter_batches(1, row_groups=[group], columns=fields, use_threads=False), None)
    except TornError:
        return False
    return True
