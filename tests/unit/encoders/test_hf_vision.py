"""Image backbones of transformers: their vectors are the library's own, and nothing else is loaded."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from pipelines.encoders import registry
from pipelines.errors import ConfigError, EncoderError
from tests.checkpoints_vision import VISION_KINDS, save_vision
from tests.unit.encoders.inputs import photos, varied
from tests.unit.encoders.reference import error, our_images, spread
from tests.unit.encoders.vision_reference import Backbone, Represent, first, last_map_mean, map_mean, pooler

CPU = torch.device("cpu")
IMAGES = {**varied(), **photos(4)}

Folder = Callable[[str], Path]


DEFAULTS: dict[str, Represent] = {
    "vit": first,
    "vit-classifier": first,
    "vit-masked": first,
    "deit": first,
    "dinov2": first,
    "dinov2-registers": first,
    "dinov3": first,
    "dinov3-convnext": pooler,
    "beit": pooler,
    "siglip": pooler,
    "efficientnet": map_mean,
    "efficientnet-classifier": pooler,
    "convnext": pooler,
    "convnext-squash": pooler,
    "swin": pooler,
    "swinv2": pooler,
    "hiera": pooler,
    "focalnet": pooler,
    "resnet": pooler,
    "regnet": pooler,
    "mobilenet-v1": pooler,
}
CHOSEN: dict[str, Represent] = {
    "vit?pool=mean": lambda output: output.last_hidden_state[0, 1:].mean(0),
    "vit?layer=-1": lambda output: output.hidden_states[-1][0, 0],
    "vit?layer=1&pool=mean": lambda output: output.hidden_states[1][0, 1:].mean(0),
    "deit?pool=mean": lambda output: output.last_hidden_state[0, 2:].mean(0),
    "dinov2-registers?pool=mean": lambda output: output.last_hidden_state[0, 5:].mean(0),
    "dinov3?pool=mean&layer=-1": lambda output: output.hidden_states[-1][0, 5:].mean(0),
    "efficientnet?layer=-1": last_map_mean,
    "convnext?pool=mean": map_mean,
    "swin?layer=-1": lambda output: output.hidden_states[-1][0].mean(0),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Folder:
    root = tmp_path_factory.mktemp("vision")
    return cache(lambda kind: save_vision(root / kind, kind))


@pytest.fixture
def copied(folder: Folder, tmp_path: Path) -> Folder:
    """A checkpoint of one's own to break."""
    return lambda kind: Path(shutil.copytree(folder(kind), tmp_path / kind))


def library(folder: Path, represent: Represent, images: dict[str, bytes]) -> np.ndarray:
    reference = Backbone(folder, represent)
    return np.stack([reference.image(data) for data in images.values()])


def assert_near(ours: np.ndarray, theirs: np.ndarray, bound: float) -> None:
    assert ours.shape == theirs.shape
    assert np.isfinite(ours).all()
    assert spread(theirs) >= 0.2 * np.linalg.norm(theirs, axis=1).mean(), "a checkpoint that tells nothing apart"
    errors = error(ours, theirs)
    assert errors.max() <= bound, f"{list(IMAGES)[int(errors.argmax())]!r}: {errors.max():.2e}"


@pytest.mark.parametrize("kind", DEFAULTS)
def test_vectors_are_the_librarys(folder: Folder, kind: str) -> None:
    spec = registry.describe(f"hf:{folder(kind)}")
    assert spec.modalities == ("image",)
    theirs = library(folder(kind), DEFAULTS[kind], IMAGES)
    assert spec.vectors["image"].dim == theirs.shape[1]
    ours = our_images(registry.load(spec, CPU), list(IMAGES.values()))
    assert_near(ours, theirs, 1e-3)


@pytest.mark.parametrize("name", CHOSEN)
def test_chosen_pools_and_layers_are_the_librarys(folder: Folder, name: str) -> None:
    kind, _, options = name.partition("?")
    spec = registry.describe(f"hf:{folder(kind)}?{options}")
    theirs = library(folder(kind), CHOSEN[name], IMAGES)
    assert spec.vectors["image"].dim == theirs.shape[1]
    assert_near(our_images(registry.load(spec, CPU), list(IMAGES.values())), theirs, 1e-3)


@pytest.mark.parametrize("kind", ["vit", "dinov2-registers", "dinov3", "swin", "resnet", "regnet"])
def test_half_precision(folder: Folder, kind: str) -> None:
    spec = registry.describe(f"hf:{folder(kind)}")
    images = list(IMAGES.values())
    whole = our_images(registry.load(spec, CPU), images)
    half = registry.load(replace(spec, precision="bf16"), CPU)
    assert {parameter.dtype for parameter in half.model.parameters()} == {torch.bfloat16}
    assert_near(our_images(half, images), whole, 1e-1)


@pytest.mark.parametrize("kind", ["vit", "dinov3", "efficientnet"])
def test_batch_size_and_position_change_nothing(folder: Folder, kind: str) -> None:
    encoder = registry.load(registry.describe(f"hf:{folder(kind)}"), CPU)
    images = list(IMAGES.values())
    whole = our_images(encoder, images, len(images))
    assert_near(our_images(encoder, images, 1), whole, 1e-4)
    assert_near(our_images(encoder, images[::-1], 5)[::-1], whole, 1e-4)


# -- names and options ---------------------------------------------------------------------------


def test_every_choice_is_in_the_fingerprint(folder: Folder) -> None:
    options = ("", "?pool=mean", "?layer=-1", "?layer=0", "?layer=-1&pool=mean", "?normalize=false")
    assert len({registry.describe(f"hf:{folder('vit')}{each}").fingerprint for each in options}) == len(options)


def test_first_is_another_word_for_cls(folder: Folder) -> None:
    prints = {registry.describe(f"hf:{folder('vit')}{each}").fingerprint for each in ("", "?pool=first", "?pool=cls")}
    assert len(prints) == 1


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("swin?pool=cls", r"a SwinModel has no class token.*\n.*pool=mean"),
        ("vit?pool=pooler", "not trained on"),
        ("vit?pool=max", "max is not known.*\n.*mean"),
        ("dinov2?pool=pooler&layer=1", "last hidden state"),
        ("vit?layer=3", r"3 hidden states.*\n.*-3 to -1"),
        ("vit?layer=last", "whole number"),
    ],
)
def test_options_that_make_no_sense_are_refused(folder: Folder, name: str, said: str) -> None:
    kind, _, options = name.partition("?")
    with pytest.raises(ConfigError, match=f"(?s){said}"):
        registry.describe(f"hf:{folder(kind)}?{options}")


def test_a_map_has_no_token(folder: Folder) -> None:
    with pytest.raises(EncoderError, match="maps"):
        registry.describe(f"hf:{folder('dinov3-convnext')}?layer=-1&pool=cls")


def test_the_model_type_names_the_class_where_none_is_listed(folder: Folder, copied: Folder) -> None:
    path = copied("dinov2")
    edited(path / "config.json", architectures=None)
    spec = registry.describe(f"hf:{path}")
    assert spec.details["model"] == "Dinov2Model"
    images = list(IMAGES.values())[:3]
    theirs = our_images(registry.load(registry.describe(f"hf:{folder('dinov2')}"), CPU), images)
    np.testing.assert_array_equal(our_images(registry.load(spec, CPU), images), theirs)


@pytest.mark.parametrize("saved", ["ViTMAEModel", "YolosModel", "NoSuchModel"])
def test_other_classes_are_refused(copied: Folder, saved: str) -> None:
    path = copied("vit")
    edited(path / "config.json", architectures=[saved])
    with pytest.raises(ConfigError, match=rf"{saved}, which hf: does not embed.*\n.*Dinov2Model"):
        registry.describe(f"hf:{path}")


def test_pixels_of_another_size_than_the_models_are_refused(copied: Folder) -> None:
    path = copied("vit")
    edited(path / "preprocessor_config.json", size={"height": 32, "width": 32})
    with pytest.raises(EncoderError, match=r"32 x 32.*\n.*preprocessor_config"):
        registry.describe(f"hf:{path}")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"image_processor_type": "LevitImageProcessor", "size": {"shortest_edge": 64}}, "LevitImageProcessorPil"),
        ({"do_normalize": False}, "normalise"),
        ({"do_resize": False}, "not known"),
    ],
)
def test_processors_that_do_something_else_are_refused(copied: Folder, change: dict[str, Any], said: str) -> None:
    path = copied("vit")
    edited(path / "preprocessor_config.json", **change)
    with pytest.raises(EncoderError, match=said):
        registry.describe(f"hf:{path}")


def edited(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


# -- weights -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["vit", "dinov2", "efficientnet-classifier", "swin"])
@pytest.mark.parametrize("change", ["missing", "unexpected", "shaped"])
def test_weights_of_another_model_are_refused(copied: Folder, kind: str, change: str) -> None:
    path = copied(kind)
    state = load_file(path / "model.safetensors")
    key = next(key for key in sorted(state) if "embeddings" in key and state[key].dim() == 4)
    if change == "missing":
        del state[key]
    elif change == "shaped":
        state[key] = state[key][:-1].contiguous()
    else:
        state["a.stranger"] = torch.zeros(2)
    save_file(state, path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(EncoderError, match="a.stranger" if change == "unexpected" else key.removeprefix("vit.")[-20:]):
        registry.load(registry.describe(f"hf:{path}"), CPU)


def test_a_head_of_another_class_is_a_stranger(copied: Folder) -> None:
    """A ViTModel has no classifier to leave out."""
    path = copied("vit-classifier")
    edited(path / "config.json", architectures=["ViTModel"])
    with pytest.raises(EncoderError, match=r"classifier\.weight"):
        registry.load(registry.describe(f"hf:{path}"), CPU)


def test_weights_that_changed_after_planning_are_refused(copied: Folder) -> None:
    path = copied("vit")
    spec = registry.describe(f"hf:{path}")
    state = {key: value * 1.5 for key, value in load_file(path / "model.safetensors").items()}
    save_file(state, path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(EncoderError, match="changed"):
        registry.load(spec, CPU)


def test_all_kinds_are_compared() -> None:
    assert set(DEFAULTS) == set(VISION_KINDS)
