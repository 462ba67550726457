"""Any input through planning, reading and decoding, as a run does it but without Ray, and what holds for every row."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from pipelines.config import DecodeConfig, ReadConfig
from pipelines.contracts import PIXELS, Shard, VectorSpec
from pipelines.decode import Decode
from pipelines.encoders.base import EncoderSpec, ImageTransform, Target
from pipelines.encoders.clip_bpe import vocabulary
from pipelines.ledger import Work
from pipelines.read import read_shard
from pipelines.sources import plan_shards
from pipelines.storage import Store

SIDE = 32
TOKENS = 77
TRANSFORM = ImageTransform(
    resize="squash",
    size=(SIDE, SIDE),
    crop=None,
    resample="bicubic",
    alpha="white",
    rgb="last",
    library="torchvision",
    mean=(0.0, 0.0, 0.0),
    std=(1.0, 1.0, 1.0),
)
# What decoding asks of an encoder: a size, and CLIP's own tokenizer, which needs no checkpoint.
SPEC = EncoderSpec(
    name="open_clip:none",
    family="open_clip",
    reference="none",
    vectors={"image": VectorSpec(8), "text": VectorSpec(8)},
    image=TRANSFORM,
    context_length=TOKENS,
    weights="",
    details={"tokenizer": hashlib.sha256(vocabulary().read_bytes()).hexdigest(), "model": {"text_cfg": {}}},
)
Row = dict[str, Any]


def rows_of(
    given: Path | str | Iterable[Path | str], decode: DecodeConfig | None = None, format_: str = "auto", **read: Any
) -> list[Row]:
    """Rows of schema PIXELS of all shards of the input, end marks left out, each checked."""
    inputs = [given] if isinstance(given, str | Path) else list(given)
    settings = ReadConfig(**read)
    shards, _ = plan_shards([str(path) for path in inputs], format_, settings, Store(), {})
    return [row for shard in shards for row in shard_rows(shard, settings, decode or DecodeConfig())]


def shard_rows(shard: Shard, settings: ReadConfig, decode: DecodeConfig) -> list[Row]:
    """Raises: AssertionError where the shard does not balance."""
    stage = Decode([Target("clip", SPEC, ("image", "text"))], decode)
    blocks = read_shard(Work(shard, ("samples", "clip")), settings, Store())
    found = [row for block in blocks for part in stage(block) for row in _listed(part)]
    *rows, mark = found
    assert mark["end"] and mark["row"] == len(rows)
    assert [row["row"] for row in rows] == list(range(len(rows)))
    for row in rows:
        check(row)
    return rows


def _listed(table: Any) -> list[Row]:
    assert table.schema == PIXELS
    return list(table.to_pylist())


def check(row: Row) -> None:
    """What holds for every row: each item of it is there or rejected, once, with a reason."""
    assert not row["end"]
    image_rejects = reasons(row, "image")
    assert len(image_rejects) + (row["pixels"] is not None) == row["has_image"]
    if row["pixels"] is not None:
        assert row["pixels_shape"] == [SIDE, SIDE, 3] and len(row["pixels"]) == SIDE * SIDE * 3
        assert row["width"] > 0 and row["height"] > 0
    rejected = [reject["caption_index"] for reject in row["rejects"] if reject["modality"] == "text"]
    missing = [index for index, tokens in enumerate(row["tokens"]) if tokens is None]
    assert sorted(rejected) == missing and len(row["tokens"]) == len(row["captions"])
    assert all(len(tokens) == TOKENS for tokens in row["tokens"] if tokens is not None)
    assert all(reject["reason"] and reject["stage"] for reject in row["rejects"])


def reasons(row: Row, modality: str) -> list[str]:
    return [reject["reason"] for reject in row["rejects"] if reject["modality"] == modality]


def captions(row: Row, rejected: Callable[[str], Any]) -> Iterator[Any]:
    """The row's captions in order, `rejected(reason)` in place of those that are."""
    why = {reject["caption_index"]: reject["reason"] for reject in row["rejects"] if reject["modality"] == "text"}
    for index, text in enumerate(row["captions"]):
        yield rejected(why[index]) if index in why else text
