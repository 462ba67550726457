"""What a shard's rows become in each family: the columns it keeps, the parts it writes, what it counts."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

import pyarrow as pa
import pyarrow.compute as pc

from pipelines.contracts import (
    REJECTS_PART,
    SAMPLES_FAMILY,
    SAMPLES_PART,
    TRANSLATIONS_PART,
    Modality,
    VectorSpec,
    embedding_part,
)
from pipelines.ledger import Counts

Tables = dict[str, pa.Table]


class Family(Protocol):
    """What is computed and committed together for a shard."""

    @property
    def name(self) -> str: ...

    @property
    def fingerprint(self) -> str: ...

    @property
    def columns(self) -> list[str]:
        """Of the encode stage's output, those that the parts are made of; `row` first."""
        ...

    @property
    def schemas(self) -> dict[str, pa.Schema]:
        """By data set; the shard gets a part in each, `rejects/…` only where it has any."""
        ...

    def parts(self, shard: str, rows: pa.Table) -> Tables:
        """Rows of each data set, from consecutive rows of the shard."""
        ...

    def counts(self, rows: pa.Table) -> dict[str, Counts]:
        """Items that came in, by modality, those removed, and those absent."""
        ...


@dataclass(frozen=True)
class SamplesFamily:
    """`samples/`: one row a sample, whether or not it could be embedded."""

    name: str = SAMPLES_FAMILY
    fingerprint: str = "samples-format-1"

    @property
    def columns(self) -> list[str]:
        return ["row", *(name for name in SAMPLES_PART.names if name not in ("shard", "row"))]

    @property
    def schemas(self) -> dict[str, pa.Schema]:
        return {SAMPLES_FAMILY: SAMPLES_PART}

    def parts(self, shard: str, rows: pa.Table) -> Tables:
        return {SAMPLES_FAMILY: _with_shard(shard, standing(rows)).select(SAMPLES_PART.names).cast(SAMPLES_PART)}

    def counts(self, rows: pa.Table) -> dict[str, Counts]:
        return {}


@dataclass(frozen=True)
class EncoderFamily:
    """`embeddings/<name>/<modality>/`, `rejects/<name>/`, and `translations/<name>/` where captions are translated.

    name: the encoder's folder. vectors: of each modality that is written.
    """

    name: str
    fingerprint: str
    vectors: dict[Modality, VectorSpec]
    dtype: str
    translated: bool = False

    @property
    def columns(self) -> list[str]:
        made = [_COLUMNS[modality] for modality in self.vectors]
        return ["row", "key", "sha256", "has_image", "captions", "translations", "rejects", *made]

    @property
    def schemas(self) -> dict[str, pa.Schema]:
        embeddings = {self.dataset(modality): self._schema(modality) for modality in self.vectors}
        translations = {f"translations/{self.name}": TRANSLATIONS_PART} if self.translated else {}
        return {**embeddings, **translations, f"rejects/{self.name}": REJECTS_PART}

    def dataset(self, modality: Modality) -> str:
        return f"embeddings/{self.name}/{modality}"

    def _schema(self, modality: Modality) -> pa.Schema:
        return embedding_part(modality, self.vectors[modality], self.dtype)

    def parts(self, shard: str, rows: pa.Table) -> Tables:
        rows = standing(rows)
        tables: Tables = {f"rejects/{self.name}": self._rejects(shard, rows)}
        for modality in self.vectors:
            columns = self._texts(rows) if modality == "text" else self._rows(rows, modality)
            tables[self.dataset(modality)] = _as(self._schema(modality), _with_shard(shard, columns))
        if self.translated:
            tables[f"translations/{self.name}"] = self._translations(shard, rows)
        return tables

    def _translations(self, shard: str, rows: pa.Table) -> pa.Table:
        found = [
            {
                "shard": shard,
                "row": row["row"],
                "caption_index": at,
                "key": row["key"],
                "caption": own,
                "translation": new,
            }
            for row in rows.select(["row", "key", "captions", "translations"]).to_pylist()
            for at, (own, new) in enumerate(zip(row["captions"] or [], row["translations"] or [], strict=False))
            if new is not None
        ]
        return pa.Table.from_pylist(found, TRANSLATIONS_PART)

    def _rows(self, rows: pa.Table, modality: Modality) -> pa.Table:
        name = _COLUMNS[modality]
        embedded = rows.filter(pc.is_valid(rows[name]))
        return embedded.select(["row", "key"]).append_column("embedding", embedded[name])

    def _texts(self, rows: pa.Table) -> pa.Table:
        captions, parents = _flatten(rows["text_vectors"])
        columns = rows.select(["row", "key"]).take(parents)
        columns = columns.append_column("caption_index", pc.struct_field(captions, "caption_index"))
        return columns.append_column("embedding", pc.struct_field(captions, "vector"))

    def _rejects(self, shard: str, rows: pa.Table) -> pa.Table:
        items, parents = _flatten(rows["rejects"])
        columns = rows.select(["row", "key"]).take(parents)
        for field in items.type:
            columns = columns.append_column(field.name, pc.struct_field(items, field.name))
        return _with_shard(shard, columns).select(REJECTS_PART.names).cast(REJECTS_PART)

    def counts(self, rows: pa.Table) -> dict[str, Counts]:
        lengths = pc.fill_null(pc.list_value_length(rows["captions"]), 0)
        items = {
            "image": rows["has_image"].cast(pa.int32()),
            "text": lengths,
            "multimodal": pc.and_(rows["has_image"], pc.greater(lengths, 0)).cast(pa.int32()),
        }
        removed = pc.is_null(rows["key"])
        return {modality: _counts(items[modality], removed) for modality in self.vectors}


_COLUMNS: dict[Modality, str] = {"image": "image_vector", "text": "text_vectors", "multimodal": "multimodal_vector"}


def standing(rows: pa.Table) -> pa.Table:
    """Without those of samples that were taken down."""
    return rows.filter(pc.is_valid(rows["key"]))


def _counts(items: pa.ChunkedArray, removed: pa.ChunkedArray) -> Counts:
    """items: how many each row has. removed: whether it was taken down."""
    return Counts(items=_sum(items), removed=_sum(items.filter(removed)), absent=_sum(pc.equal(items, 0)))


def _sum(numbers: pa.ChunkedArray) -> int:
    return int(pc.sum(numbers, min_count=0).as_py())


def _as(schema: pa.Schema, table: pa.Table) -> pa.Table:
    """Its columns, with lists of numbers as vectors of the schema's shape."""
    arrays = [_shaped(table[field.name], field.type) for field in schema]
    return pa.Table.from_arrays(arrays, schema=schema)


def _shaped(column: pa.ChunkedArray, kind: pa.DataType) -> pa.Array:
    if not pa.types.is_fixed_size_list(kind):
        return column.cast(kind)
    flat = column.combine_chunks().flatten()
    if pa.types.is_fixed_size_list(kind.value_type):
        flat = pa.FixedSizeListArray.from_arrays(flat, type=kind.value_type)
    return pa.FixedSizeListArray.from_arrays(flat, type=kind)


def _flatten(column: pa.ChunkedArray) -> tuple[pa.Array, pa.Array]:
    """The items of a list column, and for each the position of its row."""
    lists = column.combine_chunks() if column.num_chunks != 1 else column.chunk(0)
    return lists.flatten(), pc.list_parent_indices(lists)


def _with_shard(shard: str, rows: pa.Table) -> pa.Table:
    return rows.append_column("shard", pa.array([shard] * rows.num_rows, pa.string()))


def by_name(families: Iterable[Family]) -> dict[str, Family]:
    return {family.name: family for family in families}
