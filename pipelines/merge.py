"""Fragments of a shard into its parts: in row order, each row once, in bounded memory."""

from __future__ import annotations

import hashlib
import uuid
from collections import Counter, defaultdict
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipelines.config import WriteConfig
from pipelines.errors import LedgerError
from pipelines.families import Family
from pipelines.fragments import Fragment, cut, pick, shard_rows
from pipelines.ledger import Commit, CommitRef, Counts, Part
from pipelines.secrets import without_credentials
from pipelines.storage import Store, scratch_folder
from pipelines.takedowns import OfShard

_FRAGMENTS_IN_MEMORY = 16
_FRAGMENT_OPTIONS = pa.ipc.IpcWriteOptions(compression="lz4")


def put_fragments(store: Store, staging: str, rows: pa.Table, end: int | None) -> None:
    """Puts `rows` of one shard (a column `row`, sorted, distinct) and its end mark under `staging`."""
    numbers = rows["row"].to_numpy()
    for ranges, last in cut(numbers, end):
        inside = [rows.slice(int(numbers.searchsorted(start)), stop - start) for start, stop in ranges]
        table = pa.concat_tables(inside) if inside else rows.slice(0, 0)
        sink = pa.BufferOutputStream()
        with pa.ipc.new_file(sink, table.schema, options=_FRAGMENT_OPTIONS) as writer:
            writer.write_table(table.combine_chunks())
        data = sink.getvalue().to_pybytes()
        store.put_atomic(f"{staging}/{Fragment.of(data, ranges, last).name}", data)


def list_fragments(store: Store, staging: str) -> list[Fragment]:
    found = (Fragment.parse(name) for name in store.names(staging))
    return [fragment for fragment in found if fragment]


def merge(
    store: Store,
    family: Family,
    ref: CommitRef,
    uri: str,
    staging: str,
    fragments: list[Fragment],
    write: WriteConfig,
    taken_down: OfShard,
) -> Commit:
    """A commit, not yet put, whose parts lie under `staging/<attempt>/`. taken_down: left out, since fragments may be
    older than that.

    Raises: FileNotFoundError where a fragment has gone, because another attempt has committed;
    LedgerError where items in and items out do not agree.
    """
    attempt = uuid.uuid4().hex
    counts: dict[str, Counts] = defaultdict(Counts)
    reasons: Counter[str] = Counter()
    removed = 0
    with scratch_folder() as folder:
        parts = PartFiles(family.schemas, Path(folder), write)
        for each in _rows_in_order(store, staging, fragments):
            rows = taken_down.masked(each)
            removed += rows["key"].null_count
            tables = family.parts(ref.shard, rows)
            parts.add(tables)
            for modality, counted in family.counts(rows).items():
                counts[modality] = counts[modality].plus(counted).plus(_outcome(family, modality, tables))
            if f"rejects/{family.name}" in tables:
                reasons.update(tables[f"rejects/{family.name}"]["reason"].to_pylist())
        placed = parts.put(store, ref, f"{staging}/{attempt}")
    number_of_rows = shard_rows(fragments) or 0
    _require_balance(ref, counts, number_of_rows)
    return Commit(
        **ref._asdict(),
        uri=without_credentials(uri),
        fingerprint=family.fingerprint,
        attempt=attempt,
        rows=number_of_rows,
        removed=removed,
        parts=placed,
        counts=dict(counts),
        reasons=dict(reasons),
    )


def _outcome(family: Family, modality: str, tables: dict[str, pa.Table]) -> Counts:
    """What became of the items, read off the parts themselves."""
    rejected = pc.sum(pc.equal(tables[f"rejects/{family.name}"]["modality"], modality)).as_py() or 0
    return Counts(embedded=tables[f"embeddings/{family.name}/{modality}"].num_rows, rejected=rejected)


_WHAT = {"image": "an image", "multimodal": "an image with a caption"}


def _require_balance(ref: CommitRef, counts: dict[str, Counts], rows: int) -> None:
    """Each item has one outcome, and each row an image, readable or not, or none."""
    for modality, count in counts.items():
        if modality != "text" and count.items + count.absent != rows:
            raise LedgerError(
                f"Shard {ref.shard}: of {rows} rows {count.items} have {_WHAT[modality]} and {count.absent} have none",
                "This is a fault of vecmill: nothing was committed for the shard. Please report it.",
            )
        if count.items != count.embedded + count.rejected + count.removed:
            raise LedgerError(
                f"Shard {ref.shard}: {count.items} {modality} items came in, but {count.embedded} were embedded, "
                f"{count.rejected} rejected and {count.removed} removed",
                "This is a fault of vecmill: nothing was committed for the shard. Please report it.",
            )


def _rows_in_order(store: Store, staging: str, fragments: list[Fragment]) -> Iterator[pa.Table]:
    """Consecutive rows of the shard, a few fragments in memory at a time."""

    @lru_cache(_FRAGMENTS_IN_MEMORY)
    def load(fragment: Fragment) -> pa.Table:
        path = f"{staging}/{fragment.name}"
        data = store.read(path, fragment.is_of, listed=True)
        if not fragment.is_of(data):
            raise LedgerError(
                f"{store.uri(path)} is damaged", "Run `vecmill collect --apply`, which clears staging, and this again."
            )
        return pa.ipc.open_file(pa.py_buffer(data)).read_all()

    for fragment, start, stop in pick(fragments):
        table = load(fragment)
        yield table.slice(int(table["row"].to_numpy().searchsorted(start)), stop - start)


class PartFiles:
    """The Parquet files of one shard while they are written, in a folder on local disk."""

    def __init__(self, schemas: dict[str, pa.Schema], folder: Path, write: WriteConfig) -> None:
        self._folder, self._write = folder, write
        self._writers = {
            dataset: self._writer(dataset, position, schema)
            for position, (dataset, schema) in enumerate(schemas.items())
        }
        self._waiting: dict[str, list[pa.Table]] = defaultdict(list)
        self._rows: Counter[str] = Counter()
        self._files = {dataset: self._file(position) for position, dataset in enumerate(schemas)}

    def _file(self, position: int) -> Path:
        return self._folder / f"{position}.part"

    def _writer(self, dataset: str, position: int, schema: pa.Schema) -> pq.ParquetWriter:
        plain = [name for name in schema.names if name != "embedding"]
        return pq.ParquetWriter(
            self._file(position),
            schema,
            compression=self._write.compression,
            use_dictionary=[name for name in plain if name in ("shard", "uri", "label", "reason", "modality", "stage")],
            write_statistics=plain,
            write_page_index=True,
        )

    def add(self, tables: dict[str, pa.Table]) -> None:
        for dataset, table in tables.items():
            self._rows[dataset] += table.num_rows
            self._waiting[dataset].append(table)
            if sum(waiting.num_rows for waiting in self._waiting[dataset]) >= self._write.rows_per_row_group:
                self._flush(dataset)

    def _flush(self, dataset: str) -> None:
        table = pa.concat_tables(self._waiting.pop(dataset, []) or [self._writers[dataset].schema.empty_table()])
        if table.num_rows:
            self._writers[dataset].write_table(table, row_group_size=self._write.rows_per_row_group)

    def put(self, store: Store, ref: CommitRef, folder: str) -> list[Part]:
        for dataset, writer in self._writers.items():
            self._flush(dataset)
            writer.close()
        return [
            self._put_one(store, ref, folder, dataset, file)
            for dataset, file in self._files.items()
            if self._rows[dataset] or not dataset.startswith("rejects/")
        ]

    def _put_one(self, store: Store, ref: CommitRef, folder: str, dataset: str, file: Path) -> Part:
        staged = f"{folder}/{dataset.replace('/', '_')}.part"
        store.put_atomic(staged, file)
        with file.open("rb") as written:
            digest = hashlib.file_digest(written, "sha256").hexdigest()
        return Part(
            dataset=dataset,
            staged=staged,
            final=f"{dataset}/part-{ref.stem}.parquet",
            rows=self._rows[dataset],
            bytes=file.stat().st_size,
            sha256=digest,
        )
