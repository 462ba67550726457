"""The matcher that comes with the package: small, whole, and of use on scenes that it has not seen."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import torch

from pipelines.encoders import registry
from pipelines.encoders.base import EncoderSpec
from pipelines.encoders.matcher_folder import SHIPPED
from pipelines.scenes import altered, scene
from pipelines.scenes.layout import PAIRS
from pipelines.training.retrieval import recalls
from tests.unit.encoders.reference import our_images, our_texts

SCENES, SEED = 200, 7
FOLDER = Path(registry.__file__).parent / SHIPPED


@pytest.fixture(scope="module")
def spec() -> EncoderSpec:
    return registry.describe("demo")


def png(image: object) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")  # type: ignore[attr-defined]
    return file.getvalue()


def unit(vectors: np.ndarray) -> np.ndarray:
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def test_it_is_small_and_of_no_place(spec: EncoderSpec) -> None:
    assert spec.modalities == ("image", "text") and spec.reference == SHIPPED
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) < 4e6
    # The same folder elsewhere is the same encoder.
    assert registry.describe(f"matcher:{FOLDER}").fingerprint == spec.fingerprint


def test_scenes_are_found_by_words_and_by_altered_copies(spec: EncoderSpec) -> None:
    encoder, drawn = registry.load(spec, torch.device("cpu")), [scene(SEED, at) for at in range(SCENES)]
    images = unit(our_images(encoder, [png(each.image) for each in drawn], 50))
    captions = [text for each in drawn for text in each.captions]
    texts = unit(our_texts(encoder, list(registry.tokenizer(spec)(captions)), 100))
    own = np.repeat(np.arange(SCENES), [len(each.captions) for each in drawn])
    found = recalls(images, np.arange(SCENES), texts, own)
    # By chance 0.5 % and 5 %.
    assert found["text_to_image"]["recall@1"] > LEAST_1 and found["text_to_image"]["recall@10"] > LEAST_10
    copies = unit(our_images(encoder, [png(altered(each.image, at)) for at, each in enumerate(drawn)], 50))
    assert ((copies @ images.T).argmax(1) == np.arange(SCENES)).mean() >= 0.9


def test_it_tells_which_of_two_objects_is_where(spec: EncoderSpec) -> None:
    """Of a scene and its twin, in which two objects have changed places, by each one's first caption."""
    encoder = registry.load(spec, torch.device("cpu"))
    pairs = [(scene(SEED, at), scene(SEED, at, swapped=True)) for at in range(SCENES)]
    pairs = [pair for pair in pairs if pair[0].objects["relation"] in PAIRS]
    assert len(pairs) > 30
    both = [each for pair in pairs for each in pair]
    images = unit(our_images(encoder, [png(each.image) for each in both], 50)).reshape(len(pairs), 2, -1)
    tokens = list(registry.tokenizer(spec)([each.captions[0] for each in both]))
    texts = unit(our_texts(encoder, tokens, 100)).reshape(len(pairs), 2, -1)
    # By chance, and by colours and shapes alone, 0.5.
    assert (np.einsum("ptd,pid->pti", texts, images).argmax(2) == [0, 1]).mean() > LEAST_TWINS


LEAST_1, LEAST_10, LEAST_TWINS = 0.75, 0.97, 0.95
