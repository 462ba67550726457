"""What an encoder is fed from a table, and its vectors as the table's columns."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from pipelines.contracts import MODALITIES, Modality, Reject, VectorSpec, encoded_schema, number_type
from pipelines.encoders.base import EncoderSpec

Input = Any
"""uint8 [height, width, 3] of an image, int32 [at most context_length] of a caption, or both in a tuple."""


def stored(raw: NDArray[np.float32], spec: EncoderSpec, vectors: VectorSpec) -> NDArray[Any]:
    """Vectors as they are written, [n, count * dim] of spec.dtype, from float32 of the same shape.

    What has no finite form (zeros to be normalised, too large a value for float16) is not finite here.
    """
    with np.errstate(all="ignore"):
        if spec.normalize:
            each = raw.reshape(len(raw), vectors.count, vectors.dim)
            # In float64, as the sum of squares of finite float32 values may not fit float32.
            lengths = np.linalg.norm(each.astype(np.float64), axis=2, keepdims=True)
            raw = (each / lengths).astype(np.float32).reshape(raw.shape)
        return raw.astype(spec.dtype)


@dataclass(frozen=True)
class Items:
    """What one tower is fed, and where it came from.

    rows: int64 [n], positions in the table. captions: int32 [n], each one's caption_index; None where an item is a row.
    """

    table: pa.Table
    modality: Modality
    inputs: list[Input]
    rows: NDArray[np.int64]
    captions: NDArray[np.int32] | None = None

    def name(self, item: int) -> str:
        at = int(self.rows[item])
        row = f"row {self.table['row'][at]} of shard {self.table['shard'][at]}"
        if self.captions is not None:
            return f"caption {self.captions[item]} of {row}"
        return f"the image of {row}" if self.modality == "image" else f"the image and caption of {row}"


@dataclass(frozen=True)
class Vectors:
    """values: [n, count * dim] as stored, one row an item."""

    items: Items
    values: NDArray[Any]

    @property
    def finite(self) -> NDArray[np.bool_]:
        kept: NDArray[np.bool_] = np.isfinite(self.values).all(axis=1)
        return kept


def items_of(table: pa.Table, modality: Modality) -> Items:
    return {"image": images, "text": captions, "multimodal": pairs}[modality](table)


def images(table: pa.Table) -> Items:
    """The rows that have pixels, as views of Arrow's memory."""
    shapes = table["pixels_shape"].to_pylist()
    pixels = [value.as_buffer() for chunk in table["pixels"].chunks for value in chunk]
    rows = [row for row, buffer in enumerate(pixels) if buffer is not None]
    inputs = [np.frombuffer(pixels[row], np.uint8).reshape(shapes[row]) for row in rows]
    return Items(table, "image", inputs, np.array(rows, np.int64))


def captions(table: pa.Table) -> Items:
    """The captions that have tokens, of all rows."""
    column = table["tokens"].combine_chunks()
    flat, rows = column.flatten(), pc.list_parent_indices(column).to_numpy()
    indices = np.arange(len(rows)) - np.searchsorted(rows, rows)
    present = flat.is_valid().to_numpy(zero_copy_only=False)
    kept = flat.drop_null()
    ends = np.cumsum(kept.value_lengths().to_numpy(zero_copy_only=False))
    tokens = np.split(kept.flatten().to_numpy(), ends[:-1]) if len(kept) else []
    return Items(table, "text", tokens, rows[present], indices[present].astype(np.int32))


def pairs(table: pa.Table) -> Items:
    """The rows that have pixels, and tokens of their first caption."""
    pictures, texts = images(table), captions(table)
    assert texts.captions is not None
    first = {
        int(row): tokens
        for row, caption, tokens in zip(texts.rows, texts.captions, texts.inputs, strict=True)
        if not caption
    }
    both = [
        (row, (image, first[row]))
        for row, image in zip(pictures.rows.tolist(), pictures.inputs, strict=True)
        if row in first
    ]
    return Items(table, "multimodal", [pair for _, pair in both], np.array([row for row, _ in both], np.int64))


def with_vectors(table: pa.Table, encoded: dict[Modality, Vectors], spec: EncoderSpec) -> pa.Table:
    """The table without pixels and tokens, with the vectors; those not finite are among its rejects."""
    schema = encoded_schema(spec.dtype)
    made = {"rejects": _rejects(table, encoded)}
    for modality in MODALITIES:
        column = _text_vectors if modality == "text" else _row_vectors
        name = "text_vectors" if modality == "text" else f"{modality}_vector"
        made[name] = column(table.num_rows, encoded.get(modality), spec)
    return pa.table([made[name] if name in made else table[name] for name in schema.names], schema=schema)


def _row_vectors(rows: int, vectors: Vectors | None, spec: EncoderSpec) -> pa.Array:
    if vectors is None:
        return pa.nulls(rows, pa.list_(number_type(spec.dtype)))
    missing = np.ones(rows, bool)
    missing[vectors.items.rows[vectors.finite]] = False
    ends = np.cumsum(~missing) * vectors.values.shape[1]
    return _lists(vectors.values[vectors.finite], ends, pa.array(missing))


def _text_vectors(rows: int, vectors: Vectors | None, spec: EncoderSpec) -> pa.Array:
    at, captions, values = np.empty(0, np.int64), np.empty(0, np.int32), np.empty((0, 0), spec.dtype)
    if vectors is not None:
        assert vectors.items.captions is not None
        kept = vectors.finite
        at, captions, values = vectors.items.rows[kept], vectors.items.captions[kept], vectors.values[kept]
    column = encoded_schema(spec.dtype).field("text_vectors").type
    each = _lists(values, np.arange(1, len(values) + 1) * values.shape[1])
    found = pa.StructArray.from_arrays([pa.array(captions), each], fields=list(column.value_type))
    ends = np.cumsum(np.bincount(at, minlength=rows))
    return pa.ListArray.from_arrays(pa.array(np.append(0, ends), pa.int32()), found, type=column)


def _lists(values: NDArray[Any], ends: NDArray[np.int64], mask: pa.Array | None = None) -> pa.Array:
    offsets = pa.array(np.append(0, ends), pa.int32())
    return pa.ListArray.from_arrays(offsets, pa.array(values.reshape(-1)), mask=mask)


def _rejects(table: pa.Table, encoded: dict[Modality, Vectors]) -> pa.Array | pa.ChunkedArray:
    """The table's rejects with those vectors that have no finite form."""
    column = table["rejects"]
    lost = [
        (vectors.items, modality, int(item))
        for modality, vectors in encoded.items()
        for item in np.flatnonzero(~vectors.finite)
    ]
    if not lost:
        return column
    rejects = [before or [] for before in column.to_pylist()]
    for items, modality, item in lost:
        caption = None if items.captions is None else int(items.captions[item])
        reject = Reject(modality, "encode", "not_finite", f"{items.name(item)} has no finite vector", caption)
        rejects[items.rows[item]].append(asdict(reject))
    return pa.array(rejects, column.type)
