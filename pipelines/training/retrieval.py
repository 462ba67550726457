"""Retrieval among the samples that a run evaluates on: every image is embedded once, every caption is a query."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from pipelines.evaluate.metrics import of_whole, ranked

DEPTHS = (1, 5, 10)
QUERIES_AT_ONCE = 512

Vectors = NDArray[np.float32]
Identities = NDArray[np.int64]


def recalls(
    images: Vectors, of_images: Identities, texts: Vectors, of_texts: Identities
) -> dict[str, dict[str, float]]:
    """Share of queries with one of their identity among the first 1, 5 and 10 by cosine, in both directions.

    images, texts: [n, dim] and [m, dim], of unit length. of_images, of_texts: their identities. Queries whose identity
    the other side lacks are left out. Memory: QUERIES_AT_ONCE rows of scores.
    """
    return {
        "text_to_image": _recall(texts, of_texts, images, of_images),
        "image_to_text": _recall(images, of_images, texts, of_texts),
    }


def _recall(queries: Vectors, of_queries: Identities, items: Vectors, of_items: Identities) -> dict[str, float]:
    answered = np.isin(of_queries, of_items)
    if not answered.any():
        return {f"recall@{k}": 0.0 for k in DEPTHS}
    blocks = _blocks(queries[answered], of_queries[answered])
    found = of_whole((ranked(block @ items.T, own[:, None] == of_items) for block, own in blocks), DEPTHS)
    return {f"recall@{k}": found[f"recall@{k}"] for k in DEPTHS}


def _blocks(queries: Vectors, of_queries: Identities) -> Iterator[tuple[Vectors, Identities]]:
    for at in range(0, len(queries), QUERIES_AT_ONCE):
        yield queries[at : at + QUERIES_AT_ONCE], of_queries[at : at + QUERIES_AT_ONCE]
