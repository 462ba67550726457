"""The read operator: one task a pending shard, its samples numbered and cut into Arrow blocks."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from typing import Any

import pyarrow as pa
from ray.data import Datasource
from ray.data.block import BlockMetadata
from ray.data.datasource import ReadTask

from pipelines import sources
from pipelines.config import ReadConfig
from pipelines.contracts import SAMPLE, Sample
from pipelines.ledger import Work, object_of
from pipelines.observe import Clock, Observe, nowhere, peak_memory_mib
from pipelines.storage import Store
from pipelines.takedowns import UNTOUCHED, Marks, OfShard, Touched, read_takedowns


class ShardSource(Datasource):
    """Samples of shards that still lack a family; the last row of each shard is its end mark.

    output: whose takedowns hold for what is read, as they are when a task begins. superseded: by object, as
    `Takedowns.superseded` says.
    """

    def __init__(
        self,
        pending: list[Work],
        settings: ReadConfig,
        store: Store,
        observe: Observe = nowhere,
        output: Store | None = None,
        superseded: Mapping[str, Touched] | None = None,
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._pending, self._settings, self._store, self._observe = pending, settings, store, observe
        self._output, self._superseded = output, superseded or {}

    def get_name(self) -> str:
        return "ReadShards"

    def estimate_inmemory_data_size(self) -> int | None:
        return sum(work.shard.bytes for work in self._pending)

    def get_read_tasks(
        self, parallelism: int, per_task_row_limit: int | None = None, data_context: Any = None
    ) -> list[ReadTask]:
        """One for each shard, whatever parallelism Ray would like: a shard is the unit of retry."""
        return [ReadTask(self._task(work), _metadata(work), SAMPLE) for work in self._pending]

    def _task(self, work: Work) -> Callable[[], Iterator[pa.Table]]:
        settings, store, observe, output = self._settings, self._store, self._observe, self._output
        superseded = self._superseded.get(object_of(work.shard.id), UNTOUCHED)
        return lambda: read_shard(work, settings, store, observe, output, superseded)


def _metadata(work: Work) -> BlockMetadata:
    return BlockMetadata(num_rows=None, size_bytes=work.shard.bytes, input_files=(work.shard.uri,), exec_stats=None)


def read_shard(
    work: Work,
    settings: ReadConfig,
    store: Store,
    observe: Observe = nowhere,
    output: Store | None = None,
    superseded: Touched = UNTOUCHED,
) -> Iterator[pa.Table]:
    """Blocks of schema SAMPLE. The same shard is cut at the same rows every time: Ray may run the task
    again and use the blocks of both. Of a sample that the output has removed, only that it was there is read."""
    clock = Clock()
    removed = read_takedowns(output).of_shard(work.shard.id, work.shard.version, superseded) if output else None
    numbered = _timed(enumerate(sources.samples(work.shard, settings, store)), clock)
    block: list[dict[str, Any]] = []
    size, rows = 0, 0
    for row, sample in numbered:
        is_removed = removed is not None and _catches(removed, row, sample)
        record = _record(work, row, sample)
        # Of the whole record either way: a takedown between two attempts may not shift the cuts.
        size += _bytes_of(record)
        block.append(_removed(work, row, sample) if is_removed else record)
        rows = row + 1
        if len(block) >= settings.rows_per_block or size >= settings.block_mib * 2**20:
            yield pa.Table.from_pylist(block, SAMPLE)
            block, size = [], 0
    yield pa.Table.from_pylist([*block, _end_mark(work, rows)], SAMPLE)
    observe(
        stage="read", rows=rows, shards=1, bytes=work.shard.bytes, seconds=clock.seconds, peak_mib=peak_memory_mib()
    )


def _bytes_of(record: dict[str, Any]) -> int:
    """What grows without a bound of its own: metadata may be larger than the image."""
    texts = filter(None, (record.get("metadata"), *record["captions"]))
    return len(record.get("image") or b"") + sum(len(text.encode()) for text in texts)


def _timed(samples: Iterator[tuple[int, Sample]], clock: Clock) -> Iterator[tuple[int, Sample]]:
    while True:
        with clock.running():
            item = next(samples, None)
        if item is None:
            return
        yield item


def _catches(removed: OfShard, row: int, sample: Sample) -> bool:
    def content(marks: Marks) -> bytes | None:
        digest = None if sample.image is None else hashlib.sha256(sample.image).hexdigest()
        return marks.content(digest, sample.captions)

    return removed.catches(row, sample.key, content)


def _removed(work: Work, row: int, sample: Sample) -> dict[str, Any]:
    """That the sample was there, for the counts, and nothing of what it was."""
    captions = [None] * len(sample.captions)
    return {**_place(work, row, False), "captions": captions, "has_image": sample.has_image, "rejects": []}


def _place(work: Work, row: int, end: bool) -> dict[str, Any]:
    shard = work.shard
    return {
        "shard": shard.id,
        "shard_uri": shard.uri,
        "version": shard.version,
        "families": list(work.families),
        "encoder": None,
        "row": row,
        "end": end,
    }


def _end_mark(work: Work, rows: int) -> dict[str, Any]:
    return {**_place(work, rows, True), "captions": [], "has_image": False, "rejects": []}


def _record(work: Work, row: int, sample: Sample) -> dict[str, Any]:
    return {
        **_place(work, row, False),
        "key": sample.key,
        "captions": sample.captions,
        "translations": None,
        "has_image": sample.has_image,
        "uri": sample.uri,
        "offset": sample.offset,
        "length": sample.length,
        "row_group": sample.row_group,
        "label": sample.label,
        "metadata": json.dumps(sample.metadata, ensure_ascii=False, default=str),
        "rejects": [asdict(reject) for reject in sample.rejects],
        "image": sample.image,
    }
