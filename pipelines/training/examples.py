"""What training is shown: samples of the sources, their images decoded once as the matcher's encoder would.

A row of EXAMPLE is an image with all its captions. Samples without an image, a caption, or the identity that matching
goes by are left out; so are those whose image cannot be read, which are counted.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipelines.config import ImageDecodeConfig
from pipelines.contracts import Reject
from pipelines.decode import open_image
from pipelines.encoders.base import ImageTransform
from pipelines.encoders.pixels import to_pixels
from pipelines.observe import Observe
from pipelines.sources.split import Split, SplitConfig, split_of

EXAMPLE = pa.schema(
    [
        pa.field("key", pa.string()),
        pa.field("identity", pa.string()),
        pa.field("together", pa.string()),
        pa.field("captions", pa.list_(pa.string())),
        pa.field("pixels", pa.large_binary()),
    ]
)
"""identity: equal where images and captions match. together: equal where rows that follow one another are shuffled as
one; null for a row by itself. pixels: uint8, row-major, [height, width, 3] of the model's size;
null where nothing decodes them."""


@dataclass(frozen=True)
class Part:
    """Which samples are taken, and what their identity is.

    field, together: DataConfig's identity and together. named: the values of the metadata's `split` that are taken.
    hashed: the split that is taken, with its shares. All are taken where neither is given.
    """

    field: str
    named: tuple[str, ...] | None = None
    hashed: tuple[Split, SplitConfig] | None = None
    together: str | None = None

    def identity(self, row: dict[str, Any], metadata: dict[str, Any]) -> str | None:
        """None for a sample that is not of this part, or has none."""
        if self.named is not None and metadata.get("split") not in self.named:
            return None
        if self.hashed is not None:
            split, shares = self.hashed
            group = value_of(shares.by, row, metadata)
            if group is None or split_of(group, shares) != split:
                return None
        if self.field == "own":
            return f"{row['shard']} {row['row']}"
        return value_of(self.field, row, metadata)


def value_of(field: str, row: dict[str, Any], metadata: dict[str, Any]) -> str | None:
    """`key`, `label`, or a field of the metadata; None where the sample has none."""
    value = row[field] if field in ("key", "label") else metadata.get(field)
    return None if value is None else str(value)


@dataclass(frozen=True)
class Examples:
    """SAMPLE to EXAMPLE, a map operator. transform: None leaves pixels out, and images unread."""

    part: Part
    decode: ImageDecodeConfig
    transform: ImageTransform | None
    observe: Observe

    def __call__(self, batch: pa.Table) -> pa.Table:
        rows = list(self._taken(batch))
        if self.transform is not None:
            for row in rows:
                row["pixels"] = self._pixels(row.pop("image"))
            kept = [row for row in rows if row["pixels"] is not None]
            self.observe(stage="decode", rows=len(rows), unreadable=len(rows) - len(kept))
            rows = kept
        return pa.Table.from_pylist(rows, EXAMPLE)

    def _taken(self, batch: pa.Table) -> Iterator[dict[str, Any]]:
        images = batch.column("image")
        for at, row in enumerate(batch.drop_columns(["image"]).to_pylist()):
            captions = [caption for caption in row["captions"] or [] if caption]
            if row["end"] or not row["has_image"] or not captions:
                continue
            metadata = json.loads(row["metadata"] or "{}")
            identity = self.part.identity(row, metadata)
            if identity is not None:
                yield {
                    "key": row["key"],
                    "identity": identity,
                    "together": value_of(self.part.together, row, metadata) if self.part.together else None,
                    "captions": captions,
                    "image": images[at].as_py() if self.transform else None,
                }

    def _pixels(self, data: bytes | None) -> bytes | None:
        opened = open_image(data or b"", self.decode.max_pixels)
        if isinstance(opened, Reject):
            return None
        assert self.transform is not None
        try:
            return to_pixels(opened, self.transform, self.decode.max_aspect).tobytes()
        except MemoryError:
            raise
        except Exception:
            return None


def pixels_in(table: pa.Table, size: tuple[int, int]) -> NDArray[np.uint8]:
    """uint8 [n, height, width, 3] of a table of EXAMPLE."""
    joined = b"".join(table.column("pixels").to_pylist())
    return np.frombuffer(joined, np.uint8).reshape(-1, *size, 3)
