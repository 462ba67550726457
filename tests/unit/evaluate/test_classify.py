from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from torch.nn.functional import normalize, softmax

from jobs.classify import labels_in, templates_in
from pipelines.encoders import registry
from pipelines.encoders.logit_scale import logit_scale
from pipelines.errors import ConfigError, InputError
from pipelines.evaluate.classify import (
    CELL_BYTES,
    TOP,
    Counts,
    Labels,
    classify,
    conclude,
    label_task,
    make_plan,
    prompts_of,
)
from pipelines.remove import Asked, remove
from pipelines.storage import Store
from tests.indexed import ENCODER, everything, write_output
from tests.unit.evaluate.outputs import describe, label_of

NAMES = [f"label {number}" for number in range(4)]
PROMPTS = prompts_of(NAMES, ["a photo of a {}", "a drawing of a {}"])
SCALE = 20.0


def embed(texts: Any) -> np.ndarray:
    """A vector for each text, the same every time; not of unit length."""
    return np.stack([np.random.default_rng(list(text.encode())).normal(size=16) for text in texts]).astype(np.float32)


def labelled(root: Path, labels: Labels, top: int = TOP) -> dict[str, Any]:
    """The summary of what the tasks of Ray do, done here."""
    store, counts = Store(str(root)), Counts()
    plan = make_plan(store, ENCODER, labels, top)
    task = label_task(store, plan, labels, embed, top)
    for item in plan.items:
        counts.add(json.loads(task(item)["counts"]))
    return conclude(store, plan, labels, counts)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    write_output(tmp_path, parts=2)
    describe(tmp_path)
    return tmp_path


def test_probabilities_are_clips_of_averaged_prompts(root: Path) -> None:
    summary = labelled(root, Labels(PROMPTS, SCALE), top=3)
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
    first = labelled(root, Labels(PROMPTS, SCALE))
    one, other = sorted(Path(first["folder"]).glob("*.parquet"))
    stood, bytes_before = one.stat().st_mtime_ns, other.read_bytes()
    other.unlink()
    (one.parent / "part-gone.v.0.parquet").write_bytes(b"")
    plan = make_plan(Store(str(root)), ENCODER, Labels(PROMPTS, SCALE))
    assert (plan.missing, plan.stale, plan.is_done) == ([other.name], ["part-gone.v.0.parquet"], False)
    assert labelled(root, Labels(PROMPTS, SCALE)) == first
    assert one.stat().st_mtime_ns == stood and other.read_bytes() == bytes_before
    plan = make_plan(Store(str(root)), ENCODER, Labels(PROMPTS, SCALE))
    assert plan.is_done and sorted(one.parent.glob("*.parquet")) == [one, other]
    # Without Ray, since there is nothing to do.
    assert classify(Store(str(root)), plan, Labels(PROMPTS, SCALE), embed) == first
    assert labelled(root, Labels(PROMPTS, 5.0))["folder"] != first["folder"]


def test_what_was_taken_down_has_no_label(root: Path) -> None:
    items, _ = everything(root, "image")
    gone = [items[3].key, items[-1].key]
    remove(Store(str(root)), Asked(gone), "", "")
    summary = labelled(root, Labels(PROMPTS, SCALE))
    keys = [key for path in Path(summary["folder"]).glob("*.parquet") for key in pq.read_table(path)["key"].to_pylist()]
    assert summary["images"] == len(keys) == len(items) - 2 and not {*gone} & {*keys}


def test_what_is_taken_down_later_has_none_either(root: Path) -> None:
    first = labelled(root, Labels(PROMPTS, SCALE))
    items, _ = everything(root, "image")
    remove(Store(str(root)), Asked([items[3].key]), "", "")
    assert labelled(root, Labels(PROMPTS, SCALE))["images"] == first["images"] - 1
    keys = [key for path in Path(first["folder"]).glob("*.parquet") for key in pq.read_table(path)["key"].to_pylist()]
    assert items[3].key not in keys


def test_one_that_dies_leaves_no_summary_of_fewer_parts(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = Path(labelled(root, Labels(PROMPTS, SCALE))["folder"])
    sorted(folder.glob("*.parquet"))[0].unlink()

    def die(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("ray.data.from_items", die)
    plan = make_plan(Store(str(root)), ENCODER, Labels(PROMPTS, SCALE))
    with pytest.raises(KeyboardInterrupt):
        classify(Store(str(root)), plan, Labels(PROMPTS, SCALE), embed)
    assert not (folder / "summary.json").exists()


def test_many_labels_are_compared_a_few_images_at_a_time(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = labelled(root, Labels(PROMPTS, SCALE))
    before = [pq.read_table(path) for path in sorted(Path(whole["folder"]).glob("*.parquet"))]
    for path in Path(whole["folder"]).glob("*.parquet"):
        path.unlink()
    monkeypatch.setattr("pipelines.evaluate.classify.TASK_BYTES", 4 * CELL_BYTES * len(NAMES) * 3)
    assert labelled(root, Labels(PROMPTS, SCALE)) == whole
    paths = sorted(Path(whole["folder"]).glob("*.parquet"))
    for path, table in zip(paths, before, strict=True):
        again = pq.read_table(path)
        assert again.drop(["probability", "top"]) == table.drop(["probability", "top"])
        # Products of few rows and of many are rounded otherwise on some processors.
        assert np.allclose(again["probability"], table["probability"], atol=1e-6)
    assert pq.ParquetFile(paths[0]).metadata.row_group(0).num_rows == 3


def test_what_cannot_be_labelled_is_said(root: Path) -> None:
    with pytest.raises(ConfigError, match=r"not one \{\}"):
        prompts_of(["cat"], ["a {} and a {}"])
    with pytest.raises(ConfigError, match="no template"):
        prompts_of(["cat"], [])
    with pytest.raises(ConfigError, match="1 labels to choose from"):
        make_plan(Store(str(root)), ENCODER, Labels({"cat": ["cat"]}, 1.0))


def test_labels_and_templates_may_be_files_and_objects(tmp_path: Path, s3_options: dict[str, Any]) -> None:
    inputs = Store(options={"s3": s3_options})
    (tmp_path / "templates.txt").write_text("a photo of a {}\n\na drawing of a {}\n")
    inputs.put_atomic("s3://bucket/labels.json", json.dumps({"cat": ["a cat", "cats"]}).encode())
    inputs.put_atomic("s3://bucket/labels.txt", b"cat\n dog \n\ncat\n")
    assert labels_in(inputs, "s3://bucket/labels.json") == {"cat": ["a cat", "cats"]}
    assert labels_in(inputs, "s3://bucket/labels.txt") == ["cat", "dog"]
    found = templates_in(inputs, ["a {}", str(tmp_path / "templates.txt")])
    assert found == ["a {}", "a photo of a {}", "a drawing of a {}"]
    with pytest.raises(InputError, match="a photo cannot be read"):
        templates_in(inputs, ["a photo"])


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
