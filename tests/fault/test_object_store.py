"""On a real object gateway (Ceph): races, and refused credentials."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import s3fs

from pipelines.scenes import write_shards
from pipelines.storage import Store
from tests.ceph import missing_programs
from tests.flow.command import TIMEOUT_S, vecmill
from tests.flow.runs import settings, write_recipe

pytestmark = [
    pytest.mark.timeout(2 * TIMEOUT_S),
    pytest.mark.skipif(bool(missing_programs()), reason="Ceph is not installed here: radosgw, ceph-mon, ceph-osd"),
]

Options = dict[str, Any]
RACERS, ROUNDS = 16, 5
SHARDS, SAMPLES = 2, 40


@pytest.fixture(scope="module")
def bucket(ceph_store: Options, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A bucket with two shards under `in/`."""
    fs = s3fs.S3FileSystem(**ceph_store["s3"])
    fs.mkdir("scenes")
    for path in write_shards(tmp_path_factory.mktemp("shards"), SAMPLES, SHARDS, broken=6):
        fs.put_file(str(path), f"scenes/in/{path.name}")
    return "s3://scenes"


def test_of_many_that_create_an_object_one_wins(ceph_store: Options, bucket: str) -> None:
    pooled = {"s3": {**ceph_store["s3"], "config_kwargs": {"max_pool_connections": RACERS}}}
    store, start = Store(f"{bucket}/race", pooled), threading.Barrier(RACERS)

    def put(path: str, racer: int) -> bool:
        start.wait(60)
        return store.put_if_absent(path, f"racer {racer}".encode())

    with ThreadPoolExecutor(RACERS) as pool:
        for path in (f"commit-{number}.json" for number in range(ROUNDS)):
            won = list(pool.map(put, [path] * RACERS, range(RACERS)))
            assert sum(won) == 1
            assert store.read(path) == f"racer {won.index(True)}".encode()


@pytest.mark.parametrize("verb", ["embed", "status"])
def test_a_wrong_secret_is_one_clear_message(
    ceph_store: Options, bucket: str, checkpoint: Path, ray_local: str, tmp_path: Path, verb: str
) -> None:
    wrong = {"s3": {**ceph_store["s3"], "secret": "wrong"}}
    recipe = settings(f"{bucket}/in/*.tar", f"{bucket}/out", checkpoint, storage=wrong)
    address = ["--address", ray_local] if verb == "embed" else []
    printed = vecmill(verb, write_recipe(tmp_path / "recipe.yaml", recipe), *address, status=2)
    assert "Traceback" not in printed
    assert f"{bucket}/" in printed and "access" in printed.lower()
