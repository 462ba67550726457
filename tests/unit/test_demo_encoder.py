"""The demo's encoder is a valid open_clip checkpoint whose vectors keep scenes apart."""

from pathlib import Path

import numpy as np
import pytest
import torch

from jobs.demo_encoder import write_demo_encoder
from pipelines.encoders import registry
from pipelines.scenes import altered, scene

SCENES = 100


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_demo_encoder(tmp_path_factory.mktemp("encoder"))


def test_the_same_seed_gives_the_same_bytes(folder: Path, tmp_path: Path) -> None:
    name = "open_clip_model.safetensors"
    again, other = write_demo_encoder(tmp_path / "a") / name, write_demo_encoder(tmp_path / "b", seed=1) / name
    assert again.read_bytes() == (folder / name).read_bytes() != other.read_bytes()
    assert again.stat().st_size < 8e6


def test_altered_copies_find_their_originals(folder: Path) -> None:
    import open_clip

    spec = registry.describe(f"open_clip:local-dir:{folder}")
    model, _, transform = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    assert spec.vectors["image"].dim == 256 and spec.modalities == ("image", "text")
    images = [scene(0, index).image for index in range(SCENES)]
    with torch.inference_mode():
        kept, sought = (
            model.eval().encode_image(torch.stack([transform(image) for image in batch]), normalize=True).numpy()
            for batch in (images, [altered(image, index) for index, image in enumerate(images)])
        )
    assert np.linalg.norm(kept - kept.mean(0), axis=1).mean() > 0.2
    assert ((sought @ kept.T).argmax(1) == np.arange(SCENES)).mean() >= 0.95
