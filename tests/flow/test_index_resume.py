"""A build that is killed between two index shards, and the next, which goes on where it stopped."""

import json
import multiprocessing
import os
import re
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import ray

from pipelines.config import IndexConfig
from pipelines.index.build import build_index
from pipelines.index.manifest import TRAINED
from pipelines.index.tune import full_probe
from pipelines.index.versions import unfinished
from pipelines.search import Searcher
from pipelines.storage import Store
from tests.indexed import ENCODER, everything, write_output

SHARDS, BEFORE = 12, 3
SETTINGS = IndexConfig(
    index_key="OPQ4_16,IVF16,PQ4x4", shards=SHARDS, recall_queries=40, max_query_ms=0.2, floor=0.0, rerank="int8"
)
HOME = f"index/{ENCODER}/image"


class Slow(Store):
    """Where the notes on all index shards but the first few take for ever: their files are there, and they count as
    not done."""

    def put_atomic(self, path: str, data: bytes | Path) -> None:
        number = re.search(r"/shard-(\d+)\.npz$", path)
        if number and int(number[1]) > BEFORE:
            time.sleep(3_600)
        super().put_atomic(path, data)


def build_until_killed(root: str, address: str) -> None:
    """Dies of SIGKILL, as a machine does, once so many index shards are filled."""
    ray.init(address=address, log_to_driver=False)

    def die(line: str) -> None:
        if line.startswith("filled") and f" {BEFORE} of {SHARDS}" in line:
            os.kill(os.getpid(), signal.SIGKILL)

    build_index(Slow(root), ENCODER, "image", SETTINGS, die)


def written(folder: Path) -> dict[str, tuple[int, int]]:
    """Which file it is, and when it was put, by name."""
    return {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in folder.iterdir()}


def test_a_killed_build_goes_on_at_the_missing_index_shards(ray_local: str, tmp_path: Path) -> None:
    store = write_output(tmp_path, parts=SHARDS)
    process = multiprocessing.get_context("spawn").Process(target=build_until_killed, args=(str(tmp_path), ray_local))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL and unfinished(store, HOME) == ["v0001"]
    noted = {path.stem for path in (tmp_path / "staging" / HOME / "v0001").glob("*/shard-*.npz")}
    before = written(tmp_path / HOME / "v0001")
    said: list[str] = []
    release = build_index(store, ENCODER, "image", SETTINGS, said.append)
    assert release.version == "v0001" and not unfinished(store, HOME) and not store.names("staging")
    after = written(tmp_path / HOME / "v0001")
    stayed = {TRAINED, "build.json"} | {f"{stem}.{suffix}" for stem in noted for suffix in ("faiss", "npy")}
    assert BEFORE <= len(noted) <= BEFORE + 1
    assert {name: after[name] for name in stayed} == {name: before[name] for name in stayed}
    assert sum(line.startswith("filled") for line in said) == SHARDS - len(noted)
    assert any("it goes on from there" in line for line in said)
    assert set(release.seconds) == {"read", "train", "add", "tune", "recall"}
    require_as_unbroken(tmp_path, release.recall.figures)


def require_as_unbroken(root: Path, figures: dict[str, Any]) -> None:
    """Another build, left alone, gives the same bytes, the same truth and the same hits."""
    store = Store(str(root))
    whole = build_index(store, ENCODER, "image", SETTINGS, force=True)
    manifests = [json.loads((root / HOME / each / "manifest.json").read_text()) for each in ("v0001", whole.version)]
    assert whole.version == "v0002" and manifests[0]["shards"] == manifests[1]["shards"]
    assert manifests[0]["recall"]["queries"] == manifests[1]["recall"]["queries"]
    _, vectors = everything(root, "image")
    params = full_probe(whole.index_key)
    one, other = (
        Searcher(store, release=each, params=params).nearest(vectors[::40], 10) for each in ("v0001", "v0002")
    )
    np.testing.assert_array_equal(one.ids, other.ids)
    np.testing.assert_array_equal(one.scores, other.scores)
    if manifests[0]["search_params"] == manifests[1]["search_params"]:
        assert figures == whole.recall.figures


def test_a_version_of_another_plan_is_left_alone(ray_local: str, tmp_path: Path) -> None:
    store = write_output(tmp_path, parts=2)
    store.put_atomic(f"{HOME}/v0001/build.json", b'{"attempt": "a", "plan": "b"}')
    said: list[str] = []
    settings = IndexConfig(recall_queries=10, max_query_ms=0.2)
    assert build_index(store, ENCODER, "image", settings, said.append).version == "v0002"
    assert unfinished(store, HOME) == ["v0001"] and any("v0001 is unfinished" in line for line in said)
