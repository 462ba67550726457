"""What the samples of an output are: sizes, captions and labels, counted part by part."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from pipelines.contracts import SAMPLES_FAMILY
from pipelines.index.parts import open_part
from pipelines.storage import Store

SIDES = np.geomspace(1, 2**16, 65)
WORDS = np.arange(0, 101)
CAPTIONS = np.arange(0, 12)
_COLUMNS = ["captions", "width", "height", "label"]


def _empty(edges: NDArray[Any]) -> NDArray[np.int64]:
    return np.zeros(len(edges) - 1, np.int64)


@dataclass
class Statistics:
    """Counts by bin: of shorter sides in pixels (SIDES), of words a caption (WORDS) and captions a sample (CAPTIONS),
    whose last bins take all above. labels: samples of each."""

    samples: int = 0
    images: int = 0
    sides: NDArray[np.int64] = field(default_factory=lambda: _empty(SIDES))
    words: NDArray[np.int64] = field(default_factory=lambda: _empty(WORDS))
    captions: NDArray[np.int64] = field(default_factory=lambda: _empty(CAPTIONS))
    labels: Counter[str] = field(default_factory=Counter)

    def add(self, batch: pa.RecordBatch) -> None:
        self.samples += batch.num_rows
        sides = pc.min_element_wise(batch["width"], batch["height"]).drop_null().to_numpy()
        self.images += len(sides)
        self.sides += _binned(sides, SIDES)
        self.captions += _binned(pc.list_value_length(batch["captions"]).fill_null(0).to_numpy(), CAPTIONS)
        texts = pc.list_flatten(batch["captions"]).drop_null()
        self.words += _binned(pc.list_value_length(pc.utf8_split_whitespace(texts)).to_numpy(), WORDS)
        self.labels.update(label for label in batch["label"].to_pylist() if label is not None)

    def histograms(self) -> dict[str, dict[str, list[float]]]:
        """As JSON: each one's edges, and the counts between them."""
        known = {"sides": (SIDES, self.sides), "words": (WORDS, self.words), "captions": (CAPTIONS, self.captions)}
        return {name: {"edges": edges.tolist(), "counts": counts.tolist()} for name, (edges, counts) in known.items()}


def _binned(values: NDArray[Any], edges: NDArray[Any]) -> NDArray[np.int64]:
    return np.histogram(np.clip(values, edges[0], edges[-1]), edges)[0].astype(np.int64)


def statistics(store: Store) -> Statistics:
    """Over every part of `samples/`; memory for a batch, and a count for each label."""
    found = Statistics()
    for name in sorted(store.names(SAMPLES_FAMILY)):
        if name.endswith(".parquet"):
            with (
                open_part(store, f"{SAMPLES_FAMILY}/{name}") as stream,
                pq.ParquetFile(stream, pre_buffer=False) as file,
            ):
                for batch in file.iter_batches(8_192, columns=_COLUMNS, use_threads=False):
                    found.add(batch)
    return found
