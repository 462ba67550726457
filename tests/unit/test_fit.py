"""A projection keeps what varies, is the same for queries, and is part of what an encoder is."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from pipelines.compact import compact_parts
from pipelines.encoders import registry
from pipelines.encoders.name import EncoderName
from pipelines.encoders.projection import reduced
from pipelines.errors import ConfigError, EncoderError
from pipelines.fit import fit, principal
from pipelines.index.parts import unit
from pipelines.remove import Asked, remove
from tests.checkpoints import save_open_clip, some_tokens
from tests.indexed import everything, write_output

CPU = torch.device("cpu")


def cloud(n: int = 500, raw: int = 12) -> np.ndarray:
    """Varies along few directions."""
    random = np.random.default_rng(0)
    values = random.normal(size=(n, raw)) * np.geomspace(1, 1e-3, raw)
    return (values @ np.linalg.qr(random.normal(size=(raw, raw)))[0] + 3).astype(np.float32)


def test_components_are_those_of_a_singular_value_decomposition() -> None:
    sample = cloud()
    mean, components, variance = principal(sample, 4, whiten=False)
    centred = sample - sample.mean(0)
    _, values, vectors = np.linalg.svd(centred.astype(np.float64), full_matrices=False)
    np.testing.assert_allclose(np.abs(np.sum(components * vectors[:4].T, axis=0)), 1, atol=1e-4)
    assert variance == pytest.approx((values[:4] ** 2).sum() / (values**2).sum(), abs=1e-5)
    np.testing.assert_allclose(mean, sample.mean(0), atol=1e-5)


def test_whitened_dimensions_have_the_same_variance() -> None:
    sample = cloud()
    mean, components, _ = principal(sample, 4, whiten=True)
    np.testing.assert_allclose(((sample - mean) @ components).var(0), 1, rtol=0.01)
    plain_mean, plain, _ = principal(sample, 4, whiten=False)
    assert ((sample - plain_mean) @ plain).var(0).max() > 10 * ((sample - plain_mean) @ plain).var(0).min()


@pytest.mark.parametrize("dim", [13, 500])
def test_more_dimensions_than_there_are_is_told(dim: int) -> None:
    with pytest.raises(ConfigError, match="cannot be fitted"):
        principal(cloud(), dim, whiten=False)
    with pytest.raises(ConfigError, match="cannot be fitted"):
        principal(cloud(4), 6, whiten=False)


def test_it_is_fitted_to_all_parts_and_modalities(tmp_path: Path) -> None:
    store = write_output(tmp_path, parts=4, encoder="clip")
    fitted = fit(store, "clip", 5, count=10**6)
    both = fit(store, "clip", 5, modalities=["image"], count=10**6)
    assert "projections/clip-image-text-5-" in fitted.path and fitted.sampled > both.sampled > 100
    fewer = fit(store, "clip", 5, count=60)
    assert fewer.sampled == 60 and fewer.path != fitted.path, "encoders that take the other go on finding it"
    assert fit(store, "clip", 5, count=10**6) == fitted, "the same of the same vectors"


@pytest.fixture(scope="module")
def name(tmp_path_factory: pytest.TempPathFactory) -> str:
    return f"open_clip:local-dir:{save_open_clip(tmp_path_factory.mktemp('projected') / 'clip')}"


def saved(folder: Path, raw: int, dim: int) -> str:
    from safetensors.numpy import save_file

    mean, components, _ = principal(cloud(raw=raw), dim, whiten=True)
    save_file({"mean": mean, "components": components}, folder / "map.safetensors", {"modalities": "image,text"})
    return str(folder / "map.safetensors")


def test_an_encoder_with_a_projection(name: str, tmp_path: Path) -> None:
    plain = registry.describe(name)
    spec = registry.describe(f"{name}?projection={saved(tmp_path, 24, 6)}")
    assert {modality: vectors.dim for modality, vectors in spec.vectors.items()} == {"image": 6, "text": 6}
    assert spec.fingerprint != plain.fingerprint
    tokens = some_tokens(49408, 77, end=49407).int()
    with torch.inference_mode():
        raw = torch.nn.functional.normalize(registry.load(plain, CPU).texts(tokens), dim=1).numpy()
        ours = registry.load(spec, CPU).texts(tokens).numpy()
    mean, components, _ = principal(cloud(raw=24), 6, whiten=True)
    np.testing.assert_allclose(ours, (raw - mean) @ components, rtol=1e-4, atol=1e-3)


def test_another_projection_is_another_encoder_and_a_changed_one_is_refused(name: str, tmp_path: Path) -> None:
    spec = registry.describe(f"{name}?projection={saved(tmp_path, 24, 6)}")
    saved(tmp_path, 24, 7)
    assert registry.describe(spec.name).fingerprint != spec.fingerprint
    with pytest.raises(EncoderError, match="has changed since"):
        registry.load(spec, CPU)


def test_what_does_not_fit_is_told(name: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="projects image and text vectors of 30 dimensions"):
        registry.describe(f"{name}?projection={saved(tmp_path, 30, 6)}")
    (tmp_path / "broken").write_bytes(b"no tensors")
    with pytest.raises(EncoderError, match="is no projection"):
        registry.describe(f"{name}?projection={tmp_path / 'broken'}")
    with pytest.raises(EncoderError, match="does not exist"):
        registry.describe(f"{name}?projection={tmp_path / 'absent'}")
    with pytest.raises(ConfigError, match="not trained for that"):
        registry.describe(f"{name}?dim=8")
    with pytest.raises(ConfigError, match="exclude each other"):
        registry.describe(f"{name}?dim=8&projection=x")


def test_truncation_where_the_model_was_trained_for_it(name: str) -> None:
    plain = registry.describe(name)
    plain = replace(plain, details={**plain.details, "matryoshka": [8, 16]})
    spec = reduced(plain, EncoderName.parse(f"{name}?dim=8"))
    tokens = some_tokens(49408, 77, end=49407).int()
    with torch.inference_mode():
        whole, cut = registry.load(plain, CPU).texts(tokens), registry.load(spec, CPU).texts(tokens)
    assert spec.vectors["text"].dim == 8 and torch.equal(cut, whole[:, :8])
    with pytest.raises(ConfigError, match="trained for 8, 16"):
        reduced(plain, EncoderName.parse(f"{name}?dim=9"))


@pytest.mark.parametrize("compacted", [False, True])
def test_what_was_taken_down_has_no_part_in_a_fit(tmp_path: Path, compacted: bool) -> None:
    store = write_output(tmp_path, parts=3, encoder="clip")
    before = fit(store, "clip", 5, modalities=["image"], count=10**6)
    items, vectors = everything(tmp_path, "image", "clip")
    removed = {item.key for item in items[::3]}
    remove(store, Asked(sorted(removed)), "", "")
    if compacted:
        compact_parts(store, lambda holding: None, waiting=True)
    fitted = fit(store, "clip", 5, modalities=["image"], count=10**6)
    kept = np.array([item.key not in removed for item in items])
    assert (before.sampled, fitted.sampled) == (len(items), int(kept.sum()))
    mean, components, variance = principal(unit(vectors[kept]), 5, whiten=False)
    held = load_file(fitted.path)
    np.testing.assert_allclose(held["mean"], mean, atol=1e-6)
    np.testing.assert_allclose(held["components"], components, atol=1e-5)
    assert fitted.variance == pytest.approx(variance) and fitted.path != before.path
