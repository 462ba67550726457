"""The cache in front of a real S3 server on loopback: what comes over the wire, and what is kept of it."""

from __future__ import annotations

import json
import subprocess
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import s3fs

from pipelines.errors import VecmillError
from pipelines.index.cache import Cache
from pipelines.index.current import point_at
from pipelines.index.manifest import Release
from pipelines.index.release import finish
from pipelines.search import Searcher
from pipelines.storage import Store
from tests.s3_proxy import Chaos, S3Proxy
from tests.unit.index.test_rerank import Lossy

LARGE = 2**30


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Lossy:
    return Lossy(tmp_path_factory.mktemp("made"))


class Bucket:
    """The same output in a bucket, behind a proxy that counts."""

    def __init__(self, made: Lossy, proxy: S3Proxy, options: dict[str, Any]) -> None:
        self.proxy, self.root = proxy, f"s3://bucket/{uuid.uuid4().hex}"
        self.options = {**options, "endpoint_url": proxy.url}
        self.store = Store(self.root, {"s3": self.options})
        for path in made.root.rglob("*"):
            if path.is_file():
                self.store.put_atomic(str(path.relative_to(made.root)), path)

    def ids(self, made: Lossy, cache: Cache) -> list[list[int]]:
        return Searcher(self.store, cache=cache).nearest(made.queries, 10).ids.tolist()

    def read(self, release: Release) -> dict[str, int]:
        """Bytes by the file's name, of those that cross the wire at all."""
        counted = {file.file: self.proxy.bytes_read[self._path(release, file.file)] for file in release.files}
        return {name: count for name, count in counted.items() if count}

    def _path(self, release: Release, name: str) -> str:
        return f"/{self.root.removeprefix('s3://')}/{release.folder}/{name}"


@pytest.fixture
def bucket(made: Lossy, s3_options: dict[str, Any]) -> Iterator[Bucket]:
    with S3Proxy(s3_options["endpoint_url"]) as proxy:
        yield Bucket(made, proxy, s3_options)


def local_ids(made: Lossy) -> list[list[int]]:
    return Searcher(made.store).nearest(made.queries, 10).ids.tolist()


def sizes(release: Release) -> dict[str, int]:
    return {file.file: file.bytes for file in release.files}


def test_each_file_comes_once_and_for_a_second_search_nothing(made: Lossy, bucket: Bucket, tmp_path: Path) -> None:
    cache = Cache(tmp_path, LARGE)
    for _ in range(2):
        assert bucket.ids(made, cache) == local_ids(made)
        assert bucket.read(made.release) == sizes(made.release)


def test_of_another_release_what_differs_comes_and_nothing_else(
    made: Lossy, bucket: Bucket, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """The same FAISS files with other side files."""
    cache, other = Cache(tmp_path, LARGE), Lossy(tmp_path_factory.mktemp("other"), "int8")
    assert bucket.ids(made, cache) == local_ids(made)
    newer = other.release.model_copy(update={"version": "v0002"})
    for file in newer.files:
        bucket.store.put_atomic(f"{newer.folder}/{file.file}", other.root / other.release.folder / file.file)
    finish(bucket.store, newer, publish=False)
    point_at(bucket.store, newer.folder.rpartition("/")[0], "v0002")
    assert bucket.ids(made, cache) == local_ids(other)
    sides = {shard.side.file: shard.side.bytes for shard in newer.shards if shard.side}
    assert bucket.read(newer) == sides and len(sides) == 3
    assert {path.name for path in tmp_path.iterdir()} == {file.sha256 for file in (*made.release.files, *newer.files)}


PROCESS = """
import json, sys
from pathlib import Path
import numpy as np
from pipelines.index.cache import Cache
from pipelines.search import Searcher
from pipelines.storage import Store
root, options, folder, queries = sys.argv[1:]
print("ready", flush=True)
sys.stdin.readline()
searcher = Searcher(Store(root, {"s3": json.loads(options)}), cache=Cache(Path(folder), 2**30))
print(json.dumps(searcher.nearest(np.load(queries), 10).ids.tolist()))
"""


def test_processes_that_fill_it_at_once_find_the_same(made: Lossy, bucket: Bucket, tmp_path: Path) -> None:
    np.save(tmp_path / "queries.npy", made.queries)
    words = [bucket.root, json.dumps(bucket.options), str(tmp_path / "cache"), str(tmp_path / "queries.npy")]
    both = [
        subprocess.Popen(
            [sys.executable, "-c", PROCESS, *words], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        for _ in range(2)
    ]
    # Both have imported everything before either begins.
    assert [each.stdout and each.stdout.readline() for each in both] == ["ready\n"] * 2
    for each in both:
        assert each.stdin
        each.stdin.write("\n")
        each.stdin.flush()
    for each in both:
        assert json.loads(each.communicate(timeout=300)[0]) == local_ids(made)
    kept = {path.name: path.stat().st_size for path in (tmp_path / "cache").iterdir()}
    assert kept == {file.sha256: file.bytes for file in made.release.files}


@pytest.mark.parametrize("kind", ["short", "torn"])
def test_half_a_file_is_never_taken_for_a_whole(
    made: Lossy, bucket: Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.setattr(s3fs.S3FileSystem, "retries", 1)
    monkeypatch.setattr("pipelines.retry.ATTEMPTS", 2)
    cache = Cache(tmp_path, LARGE)
    last = made.release.shards[-1].file
    bucket.proxy.chaos = Chaos(1, (kind,), matches=lambda method, path: path.endswith(last))
    with pytest.raises(VecmillError):
        bucket.ids(made, cache)
    assert bucket.proxy.chaos.made[kind]
    assert made.release.shards[-1].sha256 not in {path.name for path in tmp_path.iterdir()}
    assert not list(tmp_path.glob(".*.tmp"))
    bucket.proxy.chaos = None
    assert bucket.ids(made, cache) == local_ids(made)
