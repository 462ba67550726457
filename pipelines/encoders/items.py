"""What an encoder is fed from a table, and its vectors as the table's columns."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from pipelines.contracts import Modality, Reject, encoded_schema, vector_type
from pipelines.encoders.base import EncoderSpec

Input = NDArray[Any]
"""uint8 [height, width, 3] of an image, int32 [context_length] of a caption."""


def stored(raw: NDArray[np.float32], spec: EncoderSpec) -> NDArray[Any]:
    """Vectors as they are written, [n, dim] of spec.dtype, from float32 [n, dim].

    What has no finite form (zeros to be normalised, too large a value for float16) is not finite here.
    """
    with np.errstate(all="ignore"):
        if spec.normalize:
            # In float64, as the sum of squares of finite float32 values may not fit float32.
            raw = (raw / np.linalg.norm(raw.astype(np.float64), axis=1, keepdims=True)).astype(np.float32)
        return raw.astype(spec.dtype)


@dataclass(frozen=True)
class Items:
    """What one tower is fed, and where it came from.

    rows: int64 [n], positions in the table. captions: int32 [n], each one's caption_index; None for images.
    """

    table: pa.Table
    inputs: list[Input]
    rows: NDArray[np.int64]
    captions: NDArray[np.int32] | None = None

    def name(self, item: int) -> str:
        at = int(self.rows[item])
        row = f"row {self.table['row'][at]} of shard {self.table['shard'][at]}"
        return f"the image of {row}" if self.captions is None else f"caption {self.captions[item]} of {row}"


@dataclass(frozen=True)
class Vectors:
    """values: [n, dim] as stored, one an item."""

    items: Items
    values: NDArray[Any]

    @property
    def finite(self) -> NDArray[np.bool_]:
        kept: NDArray[np.bool_] = np.isfinite(self.values).all(axis=1)
        return kept


def images(table: pa.Table) -> Items:
    """The rows that have pixels, as views of Arrow's memory."""
    shapes = table["pixels_shape"].to_pylist()
    pixels = [value.as_buffer() for chunk in table["pixels"].chunks for value in chunk]
    rows = [row for row, buffer in enumerate(pixels) if buffer is not None]
    inputs = [np.frombuffer(pixels[row], np.uint8).reshape(shapes[row]) for row in rows]
    return Items(table, inputs, np.array(rows, np.int64))


def captions(table: pa.Table) -> Items:
    """The captions that have tokens, of all rows."""
    column = table["tokens"].combine_chunks()
    flat, rows = column.flatten(), pc.list_parent_indices(column).to_numpy()
    indices = np.arange(len(rows)) - np.searchsorted(rows, rows)
    present = flat.is_valid().to_numpy(zero_copy_only=False)
    tokens = flat.drop_null().flatten().to_numpy().reshape(int(present.sum()), -1) if present.any() else []
    return Items(table, list(tokens), rows[present], indices[present].astype(np.int32))


def with_vectors(table: pa.Table, encoded: dict[Modality, Vectors], spec: EncoderSpec) -> pa.Table:
    """The table without pixels and tokens, with the vectors; those not finite are among its rejects."""
    schema = encoded_schema(spec.dim, spec.dtype)
    made = {
        "rejects": _rejects(table, encoded),
        "image_vector": _image_vectors(table.num_rows, encoded.get("image"), spec),
        "text_vectors": _text_vectors(table.num_rows, encoded.get("text"), spec),
    }
    return pa.table([made[name] if name in made else table[name] for name in schema.names], schema=schema)


def _image_vectors(rows: int, vectors: Vectors | None, spec: EncoderSpec) -> pa.Array:
    # Arrow keeps a slot for a null of fixed size.
    slots, missing = np.zeros((rows, spec.dim), spec.dtype), np.ones(rows, bool)
    if vectors is not None:
        at = vectors.items.rows[vectors.finite]
        slots[at], missing[at] = vectors.values[vectors.finite], False
    return _fixed_size_list(slots, spec, mask=pa.array(missing))


def _text_vectors(rows: int, vectors: Vectors | None, spec: EncoderSpec) -> pa.Array:
    at, captions, values = np.empty(0, np.int64), np.empty(0, np.int32), np.empty((0, spec.dim), spec.dtype)
    if vectors is not None:
        assert vectors.items.captions is not None
        kept = vectors.finite
        at, captions, values = vectors.items.rows[kept], vectors.items.captions[kept], vectors.values[kept]
    column = encoded_schema(spec.dim, spec.dtype).field("text_vectors").type
    pairs = pa.StructArray.from_arrays(
        [pa.array(captions), _fixed_size_list(values, spec)], fields=list(column.value_type)
    )
    ends = np.cumsum(np.bincount(at, minlength=rows))
    return pa.ListArray.from_arrays(pa.array(np.append(0, ends), pa.int32()), pairs, type=column)


def _fixed_size_list(values: NDArray[Any], spec: EncoderSpec, mask: pa.Array | None = None) -> pa.Array:
    flat = pa.array(values.reshape(-1))
    return pa.FixedSizeListArray.from_arrays(flat, type=vector_type(spec.dim, spec.dtype), mask=mask)


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
