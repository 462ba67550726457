"""Rows as the encode stage hands them to the write stage, for tests of what comes after it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa

from pipelines.contracts import VectorSpec, encoded_schema
from pipelines.families import EncoderFamily, Family, SamplesFamily

DIM = 4
ENCODER = EncoderFamily("enc-01234567", "f" * 64, {"image": VectorSpec(DIM), "text": VectorSpec(DIM)}, "float16")
FAMILIES: dict[str, Family] = {"samples": SamplesFamily(), ENCODER.name: ENCODER}


def encoded_row(row: int, shard: str = "a-000000000000", version: str = "v1") -> dict[str, Any]:
    """Deterministic by row: some without an image, some rejected, with 0 to 2 captions, one perhaps rejected."""
    has_image, captions = row % 5 != 0, [f"caption {row}.{index}" for index in range(row % 3)]
    broken, mute = row % 7 == 1 and has_image, row % 4 == 2 and bool(captions)
    rejects = []
    if broken:
        rejects.append(reject("image", None, "truncated_image"))
    if mute:
        rejects.append(reject("text", 0, "not_utf8"))
    vector = [row, 1.0, 2.0, 3.0]
    return {
        "shard": shard,
        "shard_uri": f"s3://bucket/{shard}.tar",
        "version": version,
        "families": list(FAMILIES),
        "row": row,
        "end": False,
        "key": f"{row:05d}",
        "captions": captions,
        "has_image": has_image,
        "uri": f"s3://bucket/{shard}.tar",
        "offset": row * 512,
        "length": 100,
        "metadata": "{}",
        "rejects": rejects,
        "image_vector": vector if has_image and not broken else None,
        "text_vectors": [
            {"caption_index": index, "vector": [*vector[:3], index]}
            for index in range(len(captions))
            if index or not mute
        ],
    }


def reject(modality: str, caption_index: int | None, reason: str) -> dict[str, Any]:
    return {"modality": modality, "caption_index": caption_index, "stage": "decode", "reason": reason, "detail": ""}


def encoded_rows(rows: range, end: int | None = None, shard: str = "a-000000000000", version: str = "v1") -> pa.Table:
    """Schema `encoded_schema("float16")`; with the end mark as the last row where `end` is given."""
    records = [encoded_row(row, shard, version) for row in rows]
    if end is not None:
        mark = {**encoded_row(end, shard, version), "end": True, "captions": [], "rejects": [], "text_vectors": []}
        records.append({**mark, "has_image": False, "key": None, "image_vector": None})
    for record in records:
        if record["image_vector"]:
            record["image_vector"] = np.array(record["image_vector"], np.float16)
        for text in record["text_vectors"]:
            text["vector"] = np.array(text["vector"], np.float16)
    return pa.Table.from_pylist(records, encoded_schema("float16"))
