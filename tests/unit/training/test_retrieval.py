"""Recall by identity, against its definition written out."""

from __future__ import annotations

import numpy as np
import pytest

from pipelines.training.retrieval import recalls


def written_out(queries: np.ndarray, own: list[int], items: np.ndarray, theirs: list[int], k: int) -> float:
    hits = []
    for query, identity in zip(queries, own, strict=True):
        if identity in theirs:
            best = sorted(range(len(items)), key=lambda at: -float(query @ items[at]))[:k]
            hits.append(any(theirs[at] == identity for at in best))
    return sum(hits) / len(hits)


def unit(vectors: np.ndarray) -> np.ndarray:
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


def test_recall_is_by_identity_in_both_directions() -> None:
    rng = np.random.default_rng(2)
    of_images, of_texts = rng.integers(0, 15, 60), rng.integers(0, 17, 700)
    centres = rng.standard_normal((17, 12))
    images = unit(centres[of_images] + 1.5 * rng.standard_normal((60, 12)))
    texts = unit(centres[of_texts] + 1.5 * rng.standard_normal((700, 12)))
    found = recalls(images, of_images, texts, of_texts)
    for k in (1, 5, 10):
        forward = written_out(texts, of_texts.tolist(), images, of_images.tolist(), k)
        assert found["text_to_image"][f"recall@{k}"] == pytest.approx(forward)
        back = written_out(images, of_images.tolist(), texts, of_texts.tolist(), k)
        assert found["image_to_text"][f"recall@{k}"] == pytest.approx(back)


def test_a_model_that_gives_everything_one_vector_finds_nothing() -> None:
    same = np.tile(unit(np.ones((1, 4))), (50, 1))
    found = recalls(same, np.arange(50), same, np.arange(50))
    assert found == {name: {f"recall@{k}": 0.0 for k in (1, 5, 10)} for name in ("text_to_image", "image_to_text")}
