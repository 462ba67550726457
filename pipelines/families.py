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
    Modality,
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
        """Items that came in, by modality, and those absent."""
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
        return {SAMPLES_FAMILY: _with_shard(shard, rows).select(SAMPLES_PART.names).cast(SAMPLES_PART)}

    def counts(self, rows: pa.Table) -> dict[str, Counts]:
        return {}


@dataclass(frozen=True)
class EncoderFamily:
    """`embeddings/<name>/<modality>/` and `rejects/<name>/`.

    name: the encoder's folder. dim, dtype: of the vectors.
    """

    name: str
    fingerprint: str
    modalities: tuple[Modality, ...]
    dim: int
    dtype: str

    @property
    def columns(self) -> list[str]:
        return ["row", "key", "has_image", "captions", "rejects", "image_vector", "text_vectors"]

    @property
    def schemas(self) -> dict[str, pa.Schema]:
        embeddings = {self.dataset(modality): self._schema(modality) for modality in self.modalities}
        return {**embeddings, f"rejects/{self.name}": REJECTS_PART}

    def dataset(self, modality: Modality) -> str:
        return f"embeddings/{self.name}/{modality}"

    def _schema(self, modality: Modality) -> pa.Schema:
        return embedding_part(modality, self.dim, self.dtype)

    def parts(self, shard: str, rows: pa.Table) -> Tables:
        tables: Tables = {f"rejects/{self.name}": self._rejects(shard, rows)}
        if "image" in self.modalities:
            tables[self.dataset("image")] = self._images(shard, rows)
        if "text" in self.modalities:
            tables[self.dataset("text")] = self._texts(shard, rows)
        return tables

    def _images(self, shard: str, rows: pa.Table) -> pa.Table:
        embedded = rows.filter(pc.is_valid(rows["image_vector"]))
        columns = embedded.select(["row", "key"]).append_column("embedding", embedded["image_vector"])
        return _with_shard(shard, columns).select(self._schema("image").names).cast(self._schema("image"))

    def _texts(self, shard: str, rows: pa.Table) -> pa.Table:
        captions, parents = _flatten(rows["text_vectors"])
        columns = rows.select(["row", "key"]).take(parents)
        columns = columns.append_column("caption_index", pc.struct_field(captions, "caption_index"))
        columns = columns.append_column("embedding", pc.struct_field(captions, "vector"))
        return _with_shard(shard, columns).select(self._schema("text").names).cast(self._schema("text"))

    def _rejects(self, shard: str, rows: pa.Table) -> pa.Table:
        items, parents = _flatten(rows["rejects"])
        columns = rows.select(["row", "key"]).take(parents)
        for field in items.type:
            columns = columns.append_column(field.name, pc.struct_field(items, field.name))
        return _with_shard(shard, columns).select(REJECTS_PART.names).cast(REJECTS_PART)

    def counts(self, rows: pa.Table) -> dict[str, Counts]:
        counted: dict[str, Counts] = {}
        if "image" in self.modalities:
            images = pc.sum(rows["has_image"]).as_py() or 0
            counted["image"] = Counts(items=images, absent=rows.num_rows - images)
        if "text" in self.modalities:
            lengths = pc.fill_null(pc.list_value_length(rows["captions"]), 0)
            without = pc.sum(pc.equal(lengths, 0)).as_py() or 0
            counted["text"] = Counts(items=pc.sum(lengths).as_py() or 0, absent=without)
        return counted


def _flatten(column: pa.ChunkedArray) -> tuple[pa.Array, pa.Array]:
    """The items of a list column, and for each the position of its row."""
    lists = column.combine_chunks() if column.num_chunks != 1 else column.chunk(0)
    return lists.flatten(), pc.list_parent_indices(lists)


def _with_shard(shard: str, rows: pa.Table) -> pa.Table:
    return rows.append_column("shard", pa.array([shard] * rows.num_rows, pa.string()))


def by_name(families: Iterable[Family]) -> dict[str, Family]:
    return {family.name: family for family in families}
