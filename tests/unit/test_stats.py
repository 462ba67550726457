"""Statistics against NumPy on the whole, however the input is cut."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import ray
import ray.data

from pipelines.config import DecodeConfig, InputConfig
from pipelines.contracts import SAMPLE
from pipelines.errors import StorageError
from pipelines.sources.split import SplitConfig, split_of
from pipelines.splits import Assign, write_split
from pipelines.stats import Measure, added, draw, measure
from pipelines.storage import Store
from tests.unit.encoders.inputs import encoded, picture

IMAGES = [picture(20 + 3 * at, 30 - at, at) for at in range(9)]
CAPTIONS = [["a dog"] * (at % 3) + ["the big red ball!"] for at in range(9)]


def samples() -> pa.Table:
    rows = [
        {
            "shard": "a", "row": at, "key": f"k{at}", "end": False, "has_image": True, "captions": CAPTIONS[at],
            "image": encoded(image, "PNG"), "metadata": json.dumps({"identity": at // 4}), "label": None,
        }
        for at, image in enumerate(IMAGES)
    ]  # fmt: skip
    broken = {**rows[0], "row": 9, "key": "k9", "image": b"no image", "captions": [], "metadata": None}
    return pa.Table.from_pylist([*rows, broken, {**broken, "row": 10, "end": True}], SAMPLE)


def test_statistics_are_exact_however_the_input_is_cut() -> None:
    measure, table = Measure(DecodeConfig(), "identity"), samples()
    whole = added([measure(table)["stats"][0].as_py()])
    cut = added([measure(table.slice(at, 3))["stats"][0].as_py() for at in range(0, 11, 3)])
    assert whole == cut
    told = whole.report()
    values = np.concatenate([np.asarray(image).reshape(-1, 3) for image in IMAGES]) / 255
    np.testing.assert_allclose(told["channels"]["mean"], values.mean(0), rtol=1e-12)
    np.testing.assert_allclose(told["channels"]["std"], values.std(0), rtol=1e-9)
    assert (told["samples"], told["images"], told["unreadable_images"], told["pixels"]) == (10, 9, 1, len(values))
    assert told["captions"]["count"] == 18 and told["captions"]["per_sample"]["histogram"] == {
        "0": 1, "1": 3, "2": 3, "3": 3,
    }  # fmt: skip
    assert told["words"]["per_caption"]["mean"] == pytest.approx((9 * 2 + 9 * 4) / 18)
    assert told["identities"]["count"] == 3 and told["identities"]["images_each"]["max"] == 4
    assert draw(whole).startswith(b"\x89PNG")


def test_every_sample_is_assigned_by_its_group() -> None:
    shares = SplitConfig(train=0.5, val=0.25, test=0.25, by="identity")
    rows = Assign(shares)(samples()).to_pylist()
    assert [row["row"] for row in rows] == list(range(10))
    assert rows[-1]["group"] is None and rows[-1]["split"] is None
    assert [row["split"] for row in rows[:9]] == [split_of(str(at // 4), shares) for at in range(9)]


class Silent:
    """A data set whose store fails: what Ray makes of that."""

    def map_batches(self, *_: Any, **__: Any) -> Silent:
        return self

    def iter_rows(self, **_: Any) -> Iterator[Any]:
        failed = StorageError("Cannot read s3://bucket/in", "Look.")
        raise ray.exceptions.RayTaskError("read", "Traceback: ...", failed).as_instanceof_cause()

    iter_batches = iter_rows


def test_storage_that_fails_is_told_plainly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "shard.tar").write_bytes(b"unread")
    config = InputConfig(input=[str(tmp_path / "shard.tar")])
    monkeypatch.setattr(ray.data, "read_datasource", lambda *_, **__: Silent())
    store = Store(str(tmp_path))
    for verb in (lambda: measure(config, None), lambda: write_split(config, SplitConfig(), store, "split.parquet")):
        with pytest.raises(StorageError, match=r"^Cannot read s3://bucket/in\n  Look.$"):
            verb()
    assert not (tmp_path / "split.parquet").exists()
