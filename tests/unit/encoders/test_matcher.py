"""Matchers against their equations written out, an item at a time; what is no matcher is refused."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from pipelines.encoders import registry
from pipelines.encoders.matcher_text import words_of
from pipelines.errors import EncoderError
from tests.checkpoints_matcher import MATCHER_KINDS, save_matcher
from tests.unit.encoders.inputs import CAPTIONS, ENTITIES, photos, varied
from tests.unit.encoders.matcher_reference import MatcherReference
from tests.unit.encoders.reference import error, our_images, our_texts, spread

CPU = torch.device("cpu")
IMAGES = list({**varied(), **photos(8)}.values())
TEXTS = [*CAPTIONS, *ENTITIES, "The dog's red ball.", "two young children, standing", "woman on street with black cat"]
BOUNDS = {"fp32": 1e-3, "fp16": 2e-2, "bf16": 1e-1}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("matchers")
    for kind in MATCHER_KINDS:
        save_matcher(root / kind, kind)
    save_matcher(root / "plain", signs=["<pad>", "<unk>"])
    return root


@pytest.mark.parametrize("kind", [*MATCHER_KINDS, "plain"])
def test_vectors_are_those_of_the_equations(root: Path, kind: str) -> None:
    library, spec = MatcherReference(root / kind), registry.describe(f"matcher:{root / kind}")
    images = np.stack([library.image(data) for data in IMAGES])
    texts = np.stack([library.text(text) for text in TEXTS])
    assert spec.modalities == ("image", "text") and spec.vectors["image"] == spec.vectors["text"]
    for theirs in (images, texts):
        assert spread(theirs) >= 0.2 * np.linalg.norm(theirs, axis=1).mean(), "a checkpoint that tells nothing apart"
    # Behind batch norms, random weights do not survive half precision.
    for precision in BOUNDS if kind == "vit" else ["fp32"]:
        encoder = registry.load(replace(spec, precision=precision), CPU)
        tokens = list(registry.tokenizer(spec)(TEXTS))
        assert error(our_images(encoder, IMAGES), images).max() <= BOUNDS[precision]
        assert error(our_texts(encoder, tokens, 5), texts).max() <= BOUNDS[precision]


def test_neighbours_decide_how_far_a_caption_is_padded_and_nothing_else(root: Path) -> None:
    spec = registry.describe(f"matcher:{root / 'vit'}")
    encoder, tokens = registry.load(spec, CPU), list(registry.tokenizer(spec)(TEXTS))
    assert error(our_texts(encoder, tokens, len(tokens)), our_texts(encoder, tokens, 1)).max() <= 1e-5


def test_padding_would_show(root: Path) -> None:
    """A backward direction that starts in the padding, or a maximum over it, is far beyond the bound."""
    encoder = registry.load(registry.describe(f"matcher:{root / 'vit'}"), CPU)
    ids = torch.tensor([[2, 4, 5, 6, 3] + [0] * 9])
    right = encoder.model.text(ids, (ids > 0).long())
    unmasked = encoder.model.text(ids, torch.ones_like(ids))
    assert torch.dist(right, unmasked) > 0.05 * torch.linalg.norm(right)


def test_words_are_lower_cased_and_without_punctuation() -> None:
    assert words_of("The dog's ball -- RED_ball, №5!") == ["the", "dogs", "ball", "red", "ball", "5"]
    assert words_of("  \n") == [] and words_of("<pad> <unk>") == ["pad", "unk"]


def test_half_weights_and_a_classifier_are_taken(root: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(root / "vit", tmp_path / "half"))
    held = {name: value.half() for name, value in load_file(folder / "model.safetensors").items()}
    save_file({**held, "classifier.weight": torch.zeros(24, 5)}, folder / "model.safetensors")
    found = our_images(registry.load(registry.describe(f"matcher:{folder}"), CPU), IMAGES[:4])
    whole = our_images(registry.load(registry.describe(f"matcher:{root / 'vit'}"), CPU), IMAGES[:4])
    assert 0 < error(found, whole).max() < 0.05


def test_everything_that_decides_a_vector_is_in_the_fingerprint(root: Path, tmp_path: Path) -> None:
    before = registry.describe(f"matcher:{root / 'vit'}").fingerprint
    for number, edit in enumerate(({"mean": [0.1, 0.2, 0.3]}, {"image_size": [64, 48]}, {"max_words": 3}, "vocab")):
        folder = Path(shutil.copytree(root / "vit", tmp_path / str(number)))
        if edit == "vocab":
            words = (folder / "vocab.txt").read_text().split("\n")
            (folder / "vocab.txt").write_text("\n".join([*words[:4], *words[-2:3:-1], ""]))
        else:
            change(folder, **edit)
        assert registry.describe(f"matcher:{folder}").fingerprint != before


def change(folder: Path, **values: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    config.update(values)
    (folder / "config.json").write_text(
        json.dumps({name: value for name, value in config.items() if value is not None})
    )


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"lstm_hidden": 21}, "do not fit"),
        ({"image_tower": "resnet_of_nobody"}, "timm cannot build resnet_of_nobody"),
        ({"embed_dim": None}, "embed_dim = None"),
        ({"image_size": "large"}, "image_size = 'large'"),
        ({"flavour": 1}, "flavour is not known"),
        ({"vocab": "none.txt"}, "none.txt cannot be read"),
    ],
)
def test_what_is_no_matcher_is_refused(root: Path, tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    folder = Path(shutil.copytree(root / "vit", tmp_path / "changed"))
    change(folder, **changes)
    with pytest.raises(EncoderError, match=said):
        registry.load(registry.describe(f"matcher:{folder}"), CPU)


def test_a_vocabulary_is_checked(root: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(root / "vit", tmp_path / "changed"))
    words = (folder / "vocab.txt").read_text()
    (folder / "vocab.txt").write_text(words + "a\n")
    with pytest.raises(EncoderError, match="a word twice"):
        registry.describe(f"matcher:{folder}")
    (folder / "vocab.txt").write_text(words.removeprefix("<pad>\n"))
    with pytest.raises(EncoderError, match="does not begin with <pad>"):
        registry.describe(f"matcher:{folder}")
