"""timm's models: their vectors are the library's own, and nothing else is loaded."""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import load_file, save_file

from pipelines.encoders import registry, timm_source
from pipelines.encoders.weights import LocalFolder
from pipelines.errors import ConfigError, EncoderError
from tests.checkpoints_timm import TIMM_KINDS, save_timm
from tests.unit.encoders.inputs import photos, varied
from tests.unit.encoders.reference import error, our_images, spread
from tests.unit.encoders.vision_reference import TimmReference

CPU = torch.device("cpu")
IMAGES = {**varied(), **photos(4)}
COMMIT = "0123456789abcdef" * 2 + "01234567"

Folder = Callable[[str], Path]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Folder:
    root = tmp_path_factory.mktemp("timm")
    return cache(lambda kind: save_timm(root / kind, kind))


@pytest.fixture
def copied(folder: Folder, tmp_path: Path) -> Folder:
    """A checkpoint of one's own to break."""
    return lambda kind: Path(shutil.copytree(folder(kind), tmp_path / kind))


def library(folder: Path, **options: Any) -> np.ndarray:
    reference = TimmReference(folder, **options)
    return np.stack([reference.image(data) for data in IMAGES.values()])


def assert_near(ours: np.ndarray, theirs: np.ndarray, bound: float) -> None:
    assert ours.shape == theirs.shape
    assert np.isfinite(ours).all()
    assert spread(theirs) >= 0.2 * np.linalg.norm(theirs, axis=1).mean(), "a checkpoint that tells nothing apart"
    errors = error(ours, theirs)
    assert errors.max() <= bound, f"{list(IMAGES)[int(errors.argmax())]!r}: {errors.max():.2e}"


@pytest.mark.parametrize("kind", TIMM_KINDS)
def test_vectors_are_the_librarys(folder: Folder, kind: str) -> None:
    spec = registry.describe(f"timm:local-dir:{folder(kind)}")
    theirs = library(folder(kind))
    assert spec.modalities == ("image",)
    assert spec.vectors["image"].dim == theirs.shape[1]
    assert_near(our_images(registry.load(spec, CPU), list(IMAGES.values())), theirs, 1e-3)


def test_a_networks_head_widens_its_features(folder: Folder) -> None:
    spec = registry.describe(f"timm:local-dir:{folder('mobilenetv3')}")
    assert spec.vectors["image"].dim == 1024 != timm.create_model("mobilenetv3_small_050").num_features


@pytest.mark.parametrize(("kind", "pool"), [("resnet", "max"), ("resnet", "catavgmax"), ("squash", "max")])
def test_chosen_pools_are_the_librarys(folder: Folder, kind: str, pool: str) -> None:
    spec = registry.describe(f"timm:local-dir:{folder(kind)}?pool={pool}")
    theirs = library(folder(kind), global_pool=pool)
    assert_near(our_images(registry.load(spec, CPU), list(IMAGES.values())), theirs, 1e-3)


@pytest.mark.parametrize("kind", ["vit", "eva", "resnet", "squash"])
def test_half_precision(folder: Folder, kind: str) -> None:
    spec = registry.describe(f"timm:local-dir:{folder(kind)}")
    images = list(IMAGES.values())
    whole = our_images(registry.load(spec, CPU), images)
    half = registry.load(replace(spec, precision="bf16"), CPU)
    assert {parameter.dtype for parameter in half.model.parameters()} == {torch.bfloat16}
    assert_near(our_images(half, images), whole, 1e-1)


@pytest.mark.parametrize("kind", ["vit", "resnet", "border"])
def test_batch_size_and_position_change_nothing(folder: Folder, kind: str) -> None:
    encoder = registry.load(registry.describe(f"timm:local-dir:{folder(kind)}"), CPU)
    images = list(IMAGES.values())
    whole = our_images(encoder, images, len(images))
    assert_near(our_images(encoder, images, 1), whole, 1e-4)
    assert_near(our_images(encoder, images[::-1], 5)[::-1], whole, 1e-4)


# -- where the weights lie -----------------------------------------------------------------------


def vectors(name: str) -> np.ndarray:
    return our_images(registry.load(registry.describe(name), CPU), list(IMAGES.values())[:4])


def test_a_pickle_has_the_same_vectors_as_safetensors(folder: Folder, tmp_path: Path) -> None:
    path = save_timm(tmp_path / "pickle", "resnet", safe=False)
    assert not (path / "model.safetensors").exists()
    np.testing.assert_array_equal(vectors(f"timm:local-dir:{path}"), vectors(f"timm:local-dir:{folder('resnet')}"))


@pytest.fixture
def published(tmp_path: Path) -> Path:
    """The weights of an architecture as timm has it, without other arguments, in a folder."""
    model = timm.create_model("test_resnet.r160_in1k")
    save_file(model.state_dict(), (tmp_path / "model.safetensors"))
    return tmp_path


def test_a_file_of_a_training_run(published: Path) -> None:
    """The averaged weights, as timm prefers them."""
    state = load_file(published / "model.safetensors")
    started = {key: torch.zeros_like(value) for key, value in state.items()}
    saved = {"state_dict": started, "state_dict_ema": state, "args": argparse.Namespace(lr=1.0)}
    torch.save(saved, published / "last.pth.tar")
    name = f"timm:test_resnet.r160_in1k@{published}"
    np.testing.assert_array_equal(vectors(f"{name}/last.pth.tar"), vectors(f"{name}/model.safetensors"))


@dataclass(frozen=True)
class Hub(LocalFolder):
    commit: str = COMMIT


def test_a_name_leads_to_the_hub_at_one_commit(published: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, str | None]] = []

    def hub_folder(name: str, revision: str | None, cache: Path) -> Hub:
        asked.append((name, revision))
        return Hub(published, cache)

    monkeypatch.setattr(timm_source, "hub_folder", hub_folder)
    spec = registry.describe("timm:test_resnet")
    assert spec.reference == f"test_resnet.r160_in1k@{COMMIT}"
    registry.load(spec, CPU)
    assert asked == [("timm/test_resnet.r160_in1k", None), ("timm/test_resnet.r160_in1k", COMMIT)]
    assert spec.weights == registry.describe(f"timm:test_resnet@{published}/model.safetensors").weights


def test_weights_in_an_older_format_are_converted(folder: Folder, copied: Folder) -> None:
    """As an open_clip checkpoint has a vision tower of timm."""
    path = copied("vit")
    state = load_file(path / "model.safetensors")
    save_file({f"visual.trunk.{key}": value for key, value in state.items()}, path / "model.safetensors")
    np.testing.assert_array_equal(vectors(f"timm:local-dir:{path}"), vectors(f"timm:local-dir:{folder('vit')}"))


# -- names and options ---------------------------------------------------------------------------


def test_every_choice_is_in_the_fingerprint(folder: Folder) -> None:
    options = ("", "?pool=max", "?normalize=false")
    name = f"timm:local-dir:{folder('resnet')}"
    assert len({registry.describe(f"{name}{each}").fingerprint for each in options}) == len(options)
    assert registry.describe(f"{name}?pool=avg").fingerprint == registry.describe(name).fingerprint


def test_a_copy_elsewhere_has_the_same_fingerprint(folder: Folder, copied: Folder) -> None:
    here, there = (registry.describe(f"timm:local-dir:{path}") for path in (folder("eva"), copied("eva")))
    assert here.fingerprint == there.fingerprint


def test_preparing_images_otherwise_is_in_the_fingerprint(folder: Folder, copied: Folder) -> None:
    path = copied("vit")
    config = json.loads((path / "config.json").read_text())
    config["pretrained_cfg"]["crop_mode"] = "squash"
    (path / "config.json").write_text(json.dumps(config))
    prints = {registry.describe(f"timm:local-dir:{each}").fingerprint for each in (path, folder("vit"))}
    assert len(prints) == 2


@pytest.mark.parametrize(
    ("kind", "pool", "said"),
    [
        ("vit", "avg", r"fc_norm.*\n.*Its own is token"),
        ("vit", "bogus", "no pool=bogus"),
        ("resnet", "token", r"no pool=token.*\n.*Its own is avg"),
    ],
)
def test_pools_that_the_model_was_not_trained_with_are_refused(folder: Folder, kind: str, pool: str, said: str) -> None:
    with pytest.raises(ConfigError, match=f"(?s){said}"):
        registry.describe(f"timm:local-dir:{folder(kind)}?pool={pool}")


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("vit_tinny_patch16_224", "vit_tiny_patch16_224"),
        ("resnet18.nobody", r"resnet18\.a1_in1k"),
        ("resnet18@{}/none.pth", r"none\.pth"),
        ("resnet18@{}/weights.npz", "not a PyTorch checkpoint"),
        ("local-dir:{}", r"readme\.txt"),
        ("test_mambaout", "no weights.*hub"),
    ],
)
def test_names_that_lead_nowhere_say_what_there_is(tmp_path: Path, name: str, said: str) -> None:
    (tmp_path / "readme.txt").write_text("")
    with pytest.raises((ConfigError, EncoderError), match=f"(?s){said}"):
        registry.describe(f"timm:{name.format(tmp_path)}")


@pytest.mark.parametrize("told", ["pytorch_model.bin", "open_clip_pytorch_model.bin", "other.bin", "a.safetensors"])
def test_safetensors_are_preferred_on_the_hub(told: str) -> None:
    safe = {
        "pytorch_model.bin": "model.safetensors",
        "open_clip_pytorch_model.bin": "open_clip_model.safetensors",
        "other.bin": "other.safetensors",
        "a.safetensors": "a.safetensors",
    }
    assert timm_source._hub_files(told)[0] == safe[told]


# -- weights -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["vit", "eva", "resnet", "mobilenetv3"])
@pytest.mark.parametrize("change", ["missing", "unexpected", "shaped"])
def test_weights_of_another_model_are_refused(copied: Folder, kind: str, change: str) -> None:
    path = copied(kind) / "model.safetensors"
    state = load_file(path)
    key = "pos_embed" if "pos_embed" in state else next(key for key in sorted(state) if state[key].dim() == 4)
    if change == "missing":
        del state[key]
    elif change == "shaped":
        state[key] = state[key][:, :-1].contiguous()
    else:
        key = "a.stranger"
        state[key] = torch.zeros(2)
    save_file(state, path)
    with pytest.raises(EncoderError, match=key):
        registry.load(registry.describe(f"timm:local-dir:{path.parent}"), CPU)


def test_a_classifier_of_the_wrong_name_is_a_stranger(copied: Folder) -> None:
    path = copied("vit") / "model.safetensors"
    state = load_file(path)
    state["fc.weight"] = state.pop("head.weight")
    save_file(state, path)
    with pytest.raises(EncoderError, match=r"fc\.weight"):
        registry.load(registry.describe(f"timm:local-dir:{path.parent}"), CPU)


def test_code_in_a_pickle_is_not_run(published: Path) -> None:
    torch.save({"state_dict": print}, published / "model.pth")
    with pytest.raises(EncoderError, match="weights_only"):
        registry.load(registry.describe(f"timm:test_resnet@{published}/model.pth"), CPU)


def test_weights_that_changed_after_planning_are_refused(copied: Folder) -> None:
    path = copied("resnet")
    spec = registry.describe(f"timm:local-dir:{path}")
    state = {key: value + 1 for key, value in load_file(path / "model.safetensors").items()}
    save_file(state, path / "model.safetensors")
    with pytest.raises(EncoderError, match="changed"):
        registry.load(spec, CPU)
