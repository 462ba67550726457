"""Queries, the index's own first."""

from pathlib import Path

import numpy as np

from pipelines.config import IndexConfig
from pipelines.index.parts import embeddings_folder, list_parts
from pipelines.index.queries import Queries, caption_queries
from tests.indexed import ENCODER, write_output


def test_the_first_are_no_more_than_the_index_has_of_its_own() -> None:
    """Of those that an update is timed with, some may be gone, and captions follow."""
    queries = Queries({"image": np.ones((3, 4), np.float32), "text": np.zeros((9, 4), np.float32)}, np.arange(12) - 3)
    for count, left in ((2, 2), (5, 3)):
        first = queries.first(count)
        assert list(first.slices()) == ["image"] and len(first.vectors) == len(first.own) == left
        assert first.own.tolist() == queries.own[:left].tolist()


def test_captions_are_drawn_from_the_indexed_shards_alone(tmp_path: Path) -> None:
    """As many as are asked for, however many other shards there are."""
    store = write_output(tmp_path, parts=6)
    images = list_parts(store, embeddings_folder(ENCODER, "image"))
    drawn = caption_queries(store, ENCODER, images.run(5, 6), IndexConfig(recall_queries=60))
    assert drawn is not None and drawn.shape == (60, 16)
    gone = images.model_copy(update={"ranges": ()})
    assert caption_queries(store, ENCODER, gone, IndexConfig(recall_queries=60)) is None
