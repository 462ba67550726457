"""Promise P4: our vectors are the reference libraries' own, whatever the image and the caption."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch

from pipelines.encoders import registry
from pipelines.encoders.base import EncoderSpec
from tests.unit.encoders.conftest import Checkpoint
from tests.unit.encoders.inputs import CAPTIONS, ENTITIES, photos, varied
from tests.unit.encoders.reference import error, our_images, our_texts, reference, spread

CPU = torch.device("cpu")
KINDS = [
    "open_clip-gelu",
    "open_clip-quickgelu",
    "open_clip-squash",
    "open_clip-longest",
    "hf-clip-eos2",
    "hf-clip-eos49407",
    "hf-siglip",
    "hf-siglip2-fixed",
    "hf-siglip2-naflex",
]


# CLIP's vocabulary takes its time to load, and a spec, a tokenizer and a reference are read only.
describe, tokenizer, library = cache(registry.describe), cache(registry.tokenizer), cache(reference)


def described(checkpoint: Checkpoint, kind: str) -> EncoderSpec:
    return describe(checkpoint(kind))


def assert_near(ours: np.ndarray, theirs: np.ndarray, names: list[str], bound: float) -> None:
    assert np.isfinite(ours).all()
    assert spread(theirs) >= 0.2 * np.linalg.norm(theirs, axis=1).mean(), "a checkpoint that tells nothing apart"
    errors = error(ours, theirs)
    assert errors.max() <= bound, f"{names[int(errors.argmax())]!r}: {errors.max():.2e}"


@pytest.mark.parametrize("kind", KINDS)
def test_images(checkpoint: Checkpoint, kind: str) -> None:
    images = {**varied(), **photos()}
    assert len(images) >= 32
    spec = described(checkpoint, kind)
    theirs_of = library(checkpoint(kind))
    theirs = np.stack([theirs_of.image(data) for data in images.values()])
    ours = our_images(registry.load(spec, CPU), list(images.values()))
    assert ours.shape == (len(images), spec.vectors["image"].dim)
    assert_near(ours, theirs, list(images), 1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_captions(checkpoint: Checkpoint, kind: str) -> None:
    captions = CAPTIONS + ENTITIES
    spec = described(checkpoint, kind)
    theirs_of = library(checkpoint(kind))
    theirs = np.stack([theirs_of.text(caption) for caption in captions])
    tokenize = tokenizer(spec)
    tokens = tokenize(captions)
    assert tokens.dtype == np.int32
    assert tokens.shape == (len(captions), spec.context_length)
    assert tokenize(["a dog"]).shape == (1, spec.context_length)
    assert_near(our_texts(registry.load(spec, CPU), tokens), theirs, captions, 1e-3)


@pytest.mark.parametrize("precision, bound", [("bf16", 1e-1), ("fp16", 2e-2)])
@pytest.mark.parametrize("kind", ["open_clip-gelu", "hf-clip-eos2", "hf-siglip", "hf-siglip2-naflex"])
def test_half_precision(checkpoint: Checkpoint, kind: str, precision: str, bound: float) -> None:
    images = list(varied().values())
    spec = described(checkpoint, kind)
    whole, half = registry.load(spec, CPU), registry.load(replace(spec, precision=precision), CPU)
    assert_near(our_images(half, images), our_images(whole, images), list(varied()), bound)
    tokens = tokenizer(spec)(CAPTIONS)
    assert_near(our_texts(half, tokens), our_texts(whole, tokens), CAPTIONS, bound)


@pytest.mark.parametrize("kind", ["open_clip-gelu", "hf-clip-eos49407", "hf-siglip2-naflex"])
def test_batch_size_and_position_change_nothing(checkpoint: Checkpoint, kind: str) -> None:
    images = list(varied().values())
    encoder = registry.load(described(checkpoint, kind), CPU)
    whole = our_images(encoder, images, len(images))
    assert_near(our_images(encoder, images, 1), whole, list(varied()), 1e-4)
    assert_near(our_images(encoder, images[::-1], 5)[::-1], whole, list(varied()), 1e-4)


@pytest.mark.parametrize("kind", ["open_clip-gelu", "hf-clip-eos2", "hf-clip-eos49407"])
def test_trimmed_captions_are_exact(checkpoint: Checkpoint, kind: str) -> None:
    """Short captions, alone or beside one of full length, with which nothing is trimmed."""
    spec = described(checkpoint, kind)
    encoder = registry.load(spec, CPU)
    tokens = tokenizer(spec)([*CAPTIONS[:6], "water " * 200])
    assert_near(our_texts(encoder, tokens[:6], 1), our_texts(encoder, tokens, 7)[:6], CAPTIONS, 1e-5)


def test_trimming_shortens_what_is_computed(checkpoint: Checkpoint) -> None:
    spec = described(checkpoint, "open_clip-gelu")
    encoder = registry.load(spec, CPU)
    seen: list[int] = []
    hook = encoder._model.ln_final.register_forward_hook(lambda _, __, out: seen.append(out.shape[1]))
    encoder.texts(torch.from_numpy(tokenizer(spec)(["a dog"])))
    hook.remove()
    assert seen == [8]


def test_a_wrong_activation_shows(checkpoint: Checkpoint) -> None:
    """The same weights built with GELU in place of QuickGELU are outside the bound this file asserts."""
    name = checkpoint("open_clip-quickgelu")
    images = list(varied().values())
    encoder = registry.load(registry.describe(name), CPU)
    for block in encoder._model.visual.transformer.resblocks:
        block.mlp.gelu = torch.nn.GELU()
    theirs_of = library(name)
    theirs = np.stack([theirs_of.image(data) for data in images])
    assert error(our_images(encoder, images), theirs).max() > 1e-3
