from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from torch.nn.functional import normalize, softmax

from pipelines.encoders import registry
from pipelines.encoders.logit_scale import logit_scale
from pipelines.errors import ConfigError
from pipelines.evaluate.classify import Labels, classify, prompts_of
from pipelines.storage import Store
from tests.indexed import ENCODER, everything, write_output
from tests.unit.evaluate.outputs import describe, label_of

NAMES = [f"label {number}" for number in range(4)]
PROMPTS = prompts_of(NAMES, ["a photo of a {}", "a drawing of a {}"])
SCALE = 20.0


def embed(texts: Any) -> np.ndarray:
    """A vector for each text, the same every time; not of unit length."""
    return np.stack([np.random.default_rng(list(text.encode())).normal(size=16) for text in texts]).astype(np.float32)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    write_output(tmp_path, parts=2)
    describe(tmp_path)
    return tmp_path


def test_probabilities_are_clips_of_averaged_prompts(root: Path) -> None:
    summary = classify(Store(str(root)), ENCODER, Labels(PROMPTS, SCALE), embed, top=3)
    rows = [
        row for path in sorted(Path(summary["folder"]).glob("*.parquet")) for row in pq.read_table(path).to_pylist()
    ]
    items, vectors = everything(root, "image")
    prompts = torch.stack(
        [normalize(normalize(torch.tensor(embed(PROMPTS[name])), dim=1).mean(0), dim=0) for name in NAMES]
    )
    expected = softmax(SCALE * normalize(torch.tensor(vectors), dim=1) @ prompts.T, dim=1).numpy()
    assert [(row["shard"], row["row"], row["key"]) for row in rows] == [(i.shard, i.row, i.key) for i in items]
    for row, chances, item in zip(rows, expected, items, strict=True):
        order = np.argsort(-chances)[:3]
        assert [each["label"] for each in row["top"]] == [NAMES[at] for at in order]
        assert [each["probability"] for each in row["top"]] == pytest.approx(chances[order], abs=1e-5)
        assert (row["label"], row["probability"]) == (row["top"][0]["label"], row["top"][0]["probability"])
        assert row["known"] == (label_of(item.row) if label_of(item.row) in NAMES else None)
    known = [row for row in rows if row["known"]]
    assert summary["known"] == len(known) > 100
    assert summary["accuracy"] == pytest.approx(np.mean([row["label"] == row["known"] for row in known]))
    assert sum(summary["given"].values()) == len(rows) and set(summary["accuracy_by_label"]) == set(NAMES)


def test_the_same_again_does_only_what_is_missing(root: Path) -> None:
    first = classify(Store(str(root)), ENCODER, Labels(PROMPTS, SCALE), embed)
    one, other = sorted(Path(first["folder"]).glob("*.parquet"))
    stood, bytes_before = one.stat().st_mtime_ns, other.read_bytes()
    other.unlink()
    assert classify(Store(str(root)), ENCODER, Labels(PROMPTS, SCALE), embed) == first
    assert one.stat().st_mtime_ns == stood and other.read_bytes() == bytes_before
    assert classify(Store(str(root)), ENCODER, Labels(PROMPTS, 5.0), embed)["folder"] != first["folder"]


def test_what_cannot_be_labelled_is_said(root: Path) -> None:
    with pytest.raises(ConfigError, match=r"not one \{\}"):
        prompts_of(["cat"], ["a photo"])
    with pytest.raises(ConfigError, match="1 labels to choose from"):
        classify(Store(str(root)), ENCODER, Labels({"cat": ["cat"]}, 1.0), embed)


def test_the_scale_is_the_checkpoints(checkpoint: Path) -> None:
    from safetensors import safe_open

    weights = next(checkpoint.glob("*.safetensors"), None)
    found = logit_scale(registry.describe(f"open_clip:local-dir:{checkpoint}"))
    if weights is None:
        saved = torch.load(next(checkpoint.glob("*.bin")), weights_only=True)["logit_scale"]
    else:
        with safe_open(weights, "pt") as file:
            saved = file.get_tensor("logit_scale")
    assert found == pytest.approx(float(saved.float().exp()), rel=1e-3)
