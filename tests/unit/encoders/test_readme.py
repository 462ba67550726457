"""The README's example of an encoder family is whole: as a package of one's own, it runs."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from pipelines.encoders import registry
from pipelines.errors import ConfigError
from tests.unit.encoders.inputs import encoded, picture
from tests.unit.encoders.reference import opened, our_images

README = Path(__file__).parents[3] / "README.md"


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A package with the example, as an installer leaves it."""
    (example,) = re.findall(r"```python\n(\"\"\"Average colours.*?)```", README.read_text(), re.DOTALL)
    assert len(example.splitlines()) <= 32
    (tmp_path / "my_package").mkdir()
    (tmp_path / "my_package" / "__init__.py").touch()
    (tmp_path / "my_package" / "tiles.py").write_text(example)
    told = tmp_path / "my_package-1.0.dist-info"
    told.mkdir()
    (told / "METADATA").write_text("Metadata-Version: 2.1\nName: my-package\nVersion: 1.0\n")
    (told / "entry_points.txt").write_text(f"[{registry.ENTRY_POINTS}]\ntiles = my_package.tiles\n")
    monkeypatch.syspath_prepend(tmp_path)
    registry._others.cache_clear()
    yield
    registry._others.cache_clear()


@pytest.mark.usefixtures("installed")
def test_the_example_embeds() -> None:
    spec = registry.describe("tiles:4?tile=16")
    images = [encoded(picture(80, 60, seed), "PNG") for seed in range(5)]
    found = our_images(registry.load(spec, torch.device("cpu")), images)
    for data, vector in zip(images, found, strict=True):
        pixels = np.asarray(opened(data).convert("RGB").resize((64, 64), 2), np.float32) / 127.5 - 1
        means = pixels.reshape(4, 16, 4, 16, 3).mean((1, 3))
        np.testing.assert_allclose(vector, means.transpose(2, 0, 1).ravel(), atol=1e-5)
    assert spec.fingerprint != registry.describe("tiles:4").fingerprint
    with pytest.raises(ConfigError, match="has no option pool"):
        registry.describe("tiles:4?pool=mean")


@pytest.mark.usefixtures("installed")
def test_it_is_listed_with_the_others() -> None:
    assert registry.families() == (*registry.FAMILIES, "tiles")
