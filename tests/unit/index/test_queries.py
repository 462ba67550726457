"""Queries, the index's own first."""

from pathlib import Path

import numpy as np

from pipelines.config import IndexConfig
from pipelines.index.parts import embeddings_folder, list_parts
from pipelines.index.queries import Queries, queries_across
from tests.indexed import ENCODER, everything, write_output


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
    drawn = queries_across(store, ENCODER, "image", images.run(5, 6), IndexConfig(recall_queries=60))
    assert list(drawn) == ["text"] and drawn["text"].shape == (60, 16)
    gone = images.model_copy(update={"ranges": ()})
    assert queries_across(store, ENCODER, "image", gone, IndexConfig(recall_queries=60)) == {}


def test_an_index_of_captions_is_asked_with_images_and_one_of_pairs_with_itself_alone(tmp_path: Path) -> None:
    store = write_output(tmp_path, parts=3)
    texts = list_parts(store, embeddings_folder(ENCODER, "text"))
    across = queries_across(store, ENCODER, "text", texts.run(1, 2), IndexConfig(recall_queries=10**6))
    _, images = everything(tmp_path, "image")
    rows = list_parts(store, embeddings_folder(ENCODER, "image")).ranges[1]
    assert list(across) == ["image"]
    np.testing.assert_array_equal(across["image"], images[rows.offset : rows.offset + rows.rows])
    assert queries_across(store, ENCODER, "multimodal", texts, IndexConfig()) == {}
