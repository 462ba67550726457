"""Checkpoints, made once a session, and a home folder of the session's own for caches."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import pytest

from tests import checkpoints

Checkpoint = Callable[[str], str]

OPEN_CLIP = {
    "gelu": {},
    "quickgelu": {"quick_gelu": True},
    "squash": {"preprocess": {"resize_mode": "squash", "interpolation": "bilinear", "mean": 0.5, "std": 0.5}},
    "longest": {"preprocess": {"resize_mode": "longest", "fill_color": 127}},
}


@pytest.fixture(autouse=True)
def home(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("HOME", str(tmp_path_factory.getbasetemp()))
    yield


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """The encoder name of a checkpoint by its kind: `open_clip-gelu`, `hf-siglip`, …."""
    root = tmp_path_factory.mktemp("checkpoints")

    @cache
    def build(kind: str) -> str:
        family, _, variant = kind.partition("-")
        folder: Path = root / kind
        if family == "hf":
            return f"hf:{checkpoints.save_hf(folder, variant)}"
        return f"open_clip:local-dir:{checkpoints.save_open_clip(folder, **OPEN_CLIP[variant])}"

    return build
