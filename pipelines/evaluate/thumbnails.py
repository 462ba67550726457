"""Small pictures of samples, read where their images lie. Inputs may be gone: then there is a reason instead."""

from __future__ import annotations

import base64
import gzip
import io
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from hashlib import sha256
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from PIL import Image, ImageOps

from pipelines.errors import VecmillError
from pipelines.evaluate.groups import read_samples
from pipelines.evaluate.items import ItemPlace
from pipelines.sources.fetch import read_bounded
from pipelines.sources.text import Fault
from pipelines.storage import Store

SIDE, QUALITY, THREADS = 128, 80, 16
MAX_BYTES, MAX_PIXELS = 64 * 2**20, 200_000_000
GZIPPED = (".gz", ".tgz")
PLACE = ["row", "key", "captions", "label", "uri", "offset", "length", "row_group", "sha256"]


@dataclass(frozen=True)
class Thumbnail:
    """jpeg: None where there is none, for the reason given."""

    jpeg: bytes | None
    reason: str = ""

    @property
    def data_uri(self) -> str | None:
        return f"data:image/jpeg;base64,{base64.b64encode(self.jpeg).decode()}" if self.jpeg else None

    def image(self) -> Image.Image:
        """A grey square where there is none."""
        return Image.open(io.BytesIO(self.jpeg)) if self.jpeg else Image.new("RGB", (SIDE, SIDE), "#d8d6d0")


def samples_at(store: Store, wanted: Sequence[ItemPlace]) -> list[dict[str, Any]]:
    """What `samples/` has, PLACE of it, of each item, in their order, and `caption`: the item's own, of an image the
    first, "" without any. A part's samples are read once."""
    rows: dict[str, set[int]] = {}
    for part, row, _ in wanted:
        rows.setdefault(part, set()).add(row)
    with ThreadPoolExecutor(THREADS) as pool:
        tables = dict(zip(rows, pool.map(lambda part: _rows(store, part, rows[part]), rows), strict=True))
    found = [(tables[part][row], index) for part, row, index in wanted]
    return [{**sample, "caption": _caption(sample["captions"] or [], index)} for sample, index in found]


def _caption(captions: Sequence[str | None], index: int | None) -> str:
    told = captions if index is None else captions[index : index + 1]
    return next((text for text in told if text), "")


def _rows(store: Store, part: str, rows: set[int]) -> dict[int, dict[str, Any]]:
    table = read_samples(store, part, PLACE)
    found = table.filter(pc.is_in(table["row"], pa.array(sorted(rows))))
    return {sample["row"]: sample for sample in found.to_pylist()}


def thumbnails(store: Store, samples: Iterable[dict[str, Any]], side: int = SIDE) -> list[Thumbnail]:
    """One a sample of `samples_at`, in their order; never raises for a sample."""
    inputs = Store(options=store.options)
    with ThreadPoolExecutor(THREADS) as pool:
        return list(pool.map(lambda sample: thumbnail(inputs, sample, side), samples))


def thumbnail(inputs: Store, sample: dict[str, Any], side: int = SIDE) -> Thumbnail:
    """JPEG of at most side × side pixels. inputs: a store of whole addresses."""
    try:
        data = image_bytes(inputs, sample)
        return (
            Thumbnail(_small(data, side))
            if isinstance(data, bytes)
            else Thumbnail(None, f"{data.reason}: {data.detail}")
        )
    except FileNotFoundError:
        return Thumbnail(None, "the input is gone")
    except VecmillError as error:
        return Thumbnail(None, error.what)
    except Exception as error:
        # Of bytes that are no image, or no archive, Pillow and gzip raise all kinds of errors, SyntaxError among them.
        return Thumbnail(None, f"{type(error).__name__}: {error}"[:200])


def image_bytes(inputs: Store, sample: dict[str, Any]) -> bytes | Fault:
    """The bytes that were embedded, by the place that `samples/` has; a Fault where they are others now."""
    uri, digest = sample["uri"], sample["sha256"]
    if not digest:
        return Fault("no_image", "no image was read")
    if sample["row_group"] is not None:
        return _in_row_group(inputs, uri, sample["row_group"], digest)
    data = _in_bytes(inputs, uri, sample["offset"] or 0, sample["length"])
    if isinstance(data, bytes) and sha256(data).hexdigest() != digest:
        return Fault("changed", f"{uri} has changed since")
    return data


def _in_bytes(inputs: Store, uri: str, offset: int, length: int | None) -> bytes | Fault:
    if uri.lower().endswith(GZIPPED):
        with inputs.open(uri) as file, gzip.open(file) as unpacked:
            unpacked.seek(offset)
            return unpacked.read(min(length or MAX_BYTES, MAX_BYTES))
    if offset and length:
        return inputs.read_ranges(uri, [(offset, offset + min(length, MAX_BYTES))])[0]
    return read_bounded(inputs, uri, MAX_BYTES)


def _in_row_group(inputs: Store, uri: str, group: int, digest: str) -> bytes | Fault:
    """Known by its digest: the same image whichever row it is in, and whichever column."""
    with inputs.open(uri) as file, pq.ParquetFile(file, pre_buffer=False) as parquet:
        for name in parquet.schema_arrow.names:
            if _holds_bytes(parquet.schema_arrow.field(name).type):
                for batch in parquet.iter_batches(64, row_groups=[group], columns=[name], use_threads=False):
                    for value in batch.column(0):
                        data = _bytes_in(value.as_py())
                        if data and sha256(data).hexdigest() == digest:
                            return data
    return Fault("changed", f"{uri} has changed since")


def _holds_bytes(kind: pa.DataType) -> bool:
    if pa.types.is_struct(kind):
        return any(_holds_bytes(kind.field(at).type) for at in range(kind.num_fields))
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))


def _bytes_in(value: Any) -> bytes | None:
    found = value.get("bytes") if isinstance(value, dict) else value
    return found if isinstance(found, bytes) else None


def _small(data: bytes, side: int) -> bytes:
    with Image.open(io.BytesIO(data)) as image:
        if image.width * image.height > MAX_PIXELS:
            raise ValueError(f"{image.width} x {image.height} pixels")
        image.draft("RGB", (2 * side, 2 * side))
        upright = ImageOps.exif_transpose(image).convert("RGB")
    upright.thumbnail((side, side))
    file = io.BytesIO()
    upright.save(file, "JPEG", quality=QUALITY)
    return file.getvalue()
