"""The ids of the samples that a `--where` says yes to."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from pipelines.index.parts import Ids, PartRange, Parts, ReplacedError, open_part
from pipelines.index.selection import Flags, Selection, end_of
from pipelines.index.trace import samples_path
from pipelines.index.where import CAPTION, CAPTIONS, METADATA, Field, Where
from pipelines.storage import Store

THREADS = 8
BATCH_ROWS = 16_384


def select(store: Store, parts: Parts, where: Where, among: Selection | None = None) -> Selection:
    """What may be found, of that which may be at all, by the samples' columns.

    Reads of each part the rows of its vectors, and of `samples/` the columns that `where` names, 16,384 rows at a
    time in each of 8 threads: time grows with the output, memory with one part's items and by a bit an id. Of a
    part whose samples are gone, nothing is found.
    """
    chosen = Selection.none(end_of(parts))
    ranges = (among.of(parts) if among else parts).ranges
    with ThreadPoolExecutor(THREADS) as pool:
        for start in range(0, len(ranges), THREADS):
            some = ranges[start : start + THREADS]
            for part, flags in zip(some, pool.map(lambda part: _flags(store, parts, part, where), some), strict=True):
                chosen.put(part.offset, flags)
    return chosen & among if among else chosen


def _flags(store: Store, parts: Parts, part: PartRange, where: Where) -> Flags:
    """bool [rows of the part]."""
    flags = np.zeros(part.rows, bool)
    try:
        rows, captions = _items(store, parts.path(part))
        for first, batch in _samples(store, samples_path(store, part.name), where):
            start, stop = np.searchsorted(rows, [first[0], first[-1] + 1])
            at = np.searchsorted(first, rows[start:stop])
            there = first[at] == rows[start:stop]
            flags[start:stop] = _answers(where, batch.take(at), captions[start:stop]) & there
    except ReplacedError:
        flags[:] = False
    return flags


def _items(store: Store, path: str) -> tuple[Ids, Ids]:
    """Of each vector in a part, the row, and which of its captions it is of: the first, where it is of none."""
    with open_part(store, path) as stream, pq.ParquetFile(stream, pre_buffer=False) as file:
        named = [name for name in ("row", "caption_index") if name in file.schema_arrow.names]
        table = file.read(named, use_threads=False)
    rows = table["row"].to_numpy()
    return rows, table["caption_index"].to_numpy().astype(np.int64) if len(named) > 1 else np.zeros_like(rows)


def _samples(store: Store, path: str, where: Where) -> Iterator[tuple[Ids, pa.Table]]:
    """(rows, ascending; the columns that the expression reads) of a part of `samples/`."""
    named = {CAPTIONS if field.column == CAPTION else field.column for field in where.fields}
    with open_part(store, path) as stream, pq.ParquetFile(stream, pre_buffer=False) as file:
        for batch in file.iter_batches(BATCH_ROWS, columns=sorted(named | {"row"}), use_threads=False):
            if batch.num_rows:
                yield batch.column("row").to_numpy(), pa.Table.from_batches([batch])


def _answers(where: Where, samples: pa.Table, captions: Ids) -> Flags:
    columns = {field.name: _column(field, samples, captions) for field in where.fields}
    answers = where.test(pa.table(columns))
    return np.asarray(pc.fill_null(answers, False).to_numpy(zero_copy_only=False), bool)


def _column(field: Field, samples: pa.Table, captions: Ids) -> Any:
    if field.keys:
        return field.of_metadata(samples[METADATA].to_pylist())
    if field.column == CAPTIONS:
        return pc.fill_null(pc.list_value_length(samples[CAPTIONS]), 0)
    if field.column == CAPTION:
        return _caption(samples[CAPTIONS].combine_chunks(), captions)
    return samples[field.column]


def _caption(listed: Any, index: NDArray[np.int64]) -> pa.Array:
    """Of each list the text at its index, null where it is shorter."""
    if not len(listed):
        return pa.array([], pa.string())
    offsets = listed.offsets.to_numpy()
    at = offsets[:-1] + index
    return listed.values.take(pa.array(at, mask=at >= offsets[1:]))
