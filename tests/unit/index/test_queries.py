"""Queries, the index's own first."""

import numpy as np

from pipelines.index.queries import Queries


def test_the_first_are_no_more_than_the_index_has_of_its_own() -> None:
    """Of those that an update is timed with, some may be gone, and captions follow."""
    queries = Queries({"image": np.ones((3, 4), np.float32), "text": np.zeros((9, 4), np.float32)}, np.arange(12) - 3)
    for count, left in ((2, 2), (5, 3)):
        first = queries.first(count)
        assert list(first.slices()) == ["image"] and len(first.vectors) == len(first.own) == left
        assert first.own.tolist() == queries.own[:left].tolist()
