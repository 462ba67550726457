"""Files of a release that is elsewhere come once, are checked, and stay for whoever has them open."""

import errno
import os
import shutil
import uuid
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pytest

from jobs.options import DEFAULT_CACHE, cache_of
from pipelines.errors import IndexBuildError
from pipelines.index import cache as cache_module
from pipelines.index.cache import Cache, UnwritableError, opened_shard
from pipelines.index.choose import empty_index
from pipelines.index.files import sha256_of
from pipelines.index.manifest import IndexShard
from pipelines.search import Searcher
from pipelines.storage import Store
from tests.unit.index.test_rerank import Lossy

LARGE = 2**30


class Away:
    """The same release in storage that is not on this machine's disks."""

    def __init__(self, made: Lossy) -> None:
        self.made, self.store = made, Store(f"memory://{uuid.uuid4().hex}")
        for path in made.root.rglob("*"):
            if path.is_file():
                self.store.put_atomic(str(path.relative_to(made.root)), path)

    def searcher(self, cache: Cache | None, **how: Any) -> Searcher:
        return Searcher(self.store, cache=cache, **how)


@pytest.fixture(scope="module")
def away(tmp_path_factory: pytest.TempPathFactory) -> Away:
    return Away(Lossy(tmp_path_factory.mktemp("made")))


@pytest.mark.parametrize("resident", [True, False])
def test_the_second_search_fetches_nothing(
    away: Away, tmp_path: Path, resident: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, cache = away.made, Cache(tmp_path / "cache", LARGE)
    here = Searcher(made.store).nearest(made.queries, 10)
    first = away.searcher(cache, resident=resident).nearest(made.queries, 10)
    kept = {path.name for path in cache.folder.iterdir()}
    assert kept == {file.sha256 for file in made.release.files}
    opened: list[str] = []
    real = Store.open
    monkeypatch.setattr(Store, "open", lambda store, path, *words: opened.append(path) or real(store, path, *words))
    second = away.searcher(cache, resident=resident).nearest(made.queries, 10)
    for top in (first, second):
        np.testing.assert_array_equal(top.ids, here.ids)
        np.testing.assert_array_equal(top.scores, here.scores)
    assert opened == []


def test_an_open_release_outlives_its_files_here_and_there(away: Away, tmp_path: Path) -> None:
    made, cache = away.made, Cache(tmp_path / "cache", LARGE)
    other = Away(made)
    searcher = other.searcher(cache)
    before = searcher.nearest(made.queries, 10)
    other.store.delete_folder("index")
    shutil.rmtree(cache.folder)
    np.testing.assert_array_equal(searcher.nearest(made.queries, 10).ids, before.ids)


def test_what_was_used_longest_ago_goes(away: Away, tmp_path: Path) -> None:
    made = away.made
    shards = made.release.shards
    cache = Cache(tmp_path / "cache", shards[0].bytes + shards[1].bytes + 10)
    for at, shard in enumerate([*shards[:2], shards[0], shards[2]]):
        path = cache.copy_of(away.store, f"{made.release.folder}/{shard.file}", shard)
        assert path and sha256_of(path) == shard.sha256
        os.utime(path, (at, at))
    assert {path.name for path in cache.folder.iterdir()} == {shards[0].sha256, shards[2].sha256}
    small = Cache(tmp_path / "small", 100)
    assert small.copy_of(away.store, f"{made.release.folder}/{shards[0].file}", shards[0]) is None
    here = Searcher(made.store).nearest(made.queries, 10)
    np.testing.assert_array_equal(away.searcher(small).nearest(made.queries, 10).ids, here.ids)


@pytest.mark.parametrize("damage", [lambda data: data[:-9], lambda data: data[:-1] + bytes([data[-1] ^ 1])])
def test_what_comes_damaged_is_refused_and_not_kept(away: Away, tmp_path: Path, damage: Any) -> None:
    shard, cache = away.made.release.shards[0], Cache(tmp_path / "cache", LARGE)
    other = Store(f"memory://{uuid.uuid4().hex}")
    data = away.store.read(f"{away.made.release.folder}/{shard.file}")
    other.put_atomic(f"v/{shard.file}", damage(data))
    with pytest.raises(IndexBuildError, match="is not what its manifest says"):
        opened_shard(other, "v", shard, "IVF", cache)
    assert list(cache.folder.iterdir()) == []
    with pytest.raises(IndexBuildError, match=r"(?s)is gone.*Search again, in the current release"):
        opened_shard(Store(f"memory://{uuid.uuid4().hex}"), "v", shard, "IVF", cache)


@pytest.mark.parametrize("key", ["Flat", "IVF8,Flat", "OPQ4_16,IVF8,PQ4x4", "HNSW16", "OPQ4_16,IVF8_HNSW8,PQ4x4"])
def test_a_mapped_index_finds_what_one_in_memory_finds(tmp_path: Path, key: str) -> None:
    vectors = np.random.default_rng(0).normal(size=(900, 16)).astype(np.float32)
    index = empty_index(key, 16, "ip")
    index.train(vectors)
    index.add_with_ids(vectors, np.arange(900))
    local = tmp_path / "shard.faiss"
    faiss.write_index(index, str(local))
    shard = IndexShard(file=local.name, first_id=0, rows=900, bytes=local.stat().st_size, sha256=sha256_of(local))
    mapped = opened_shard(Store(str(tmp_path)), "", shard, key)
    local.unlink()
    for mine, theirs in zip(mapped.search(vectors[:9], 20), index.search(vectors[:9], 20), strict=True):
        np.testing.assert_array_equal(mine, theirs)


def test_a_local_file_of_another_size_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"abc")
    shard = IndexShard(file="a", first_id=0, rows=1, bytes=4, sha256="")
    with pytest.raises(IndexBuildError, match="is not what its manifest says"):
        opened_shard(Store(str(tmp_path)), "", shard, "Flat")
    with pytest.raises(IndexBuildError, match=r"(?s)is gone.*Search again, in the current release"):
        opened_shard(Store(str(tmp_path)), "", shard.model_copy(update={"file": "b"}), "Flat")


def test_nothing_but_its_own_copies_is_ever_deleted(away: Away, tmp_path: Path) -> None:
    """--cache may name a folder of the user's, with older and larger files in it than the cache may hold."""
    made = away.made
    shard = made.release.shards[0]
    kept = ["thesis.doc", ".profile", "a" * 63, f".{'a' * 64}.tmp", f".{'b' * 64}.{'0' * 12}.tmp"]
    dead = ["c" * 64, f".{'d' * 64}.{'0' * 12}.tmp"]
    for name in [*kept, *dead]:
        (tmp_path / name).write_bytes(b"x" * 10_000)
        os.utime(tmp_path / name, (1, 1))
    os.utime(tmp_path / kept[-1])
    Cache(tmp_path, shard.bytes + 5).copy_of(away.store, f"{made.release.folder}/{shard.file}", shard)
    assert {path.name for path in tmp_path.iterdir()} == {*kept, shard.sha256}


@pytest.mark.parametrize("folder", ["file", "file/below", "/proc/vecmill"])
def test_a_cache_that_cannot_be_written_is_told_or_done_without(away: Away, tmp_path: Path, folder: str) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UnwritableError, match="--cache none"):
        away.searcher(Cache(tmp_path / folder, LARGE))
    here = Searcher(away.made.store).nearest(away.made.queries, 10)
    without = away.searcher(Cache(tmp_path / folder, LARGE, optional=True)).nearest(away.made.queries, 10)
    np.testing.assert_array_equal(without.ids, here.ids)


def test_a_full_disk_is_told_and_leaves_nothing(away: Away, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(cache_module, "_write_all", full)
    with pytest.raises(UnwritableError, match=r"No space left.*\n.*--cache none"):
        away.searcher(Cache(tmp_path, LARGE))
    assert list(tmp_path.iterdir()) == []
    away.searcher(Cache(tmp_path, LARGE, optional=True))


def test_only_the_default_cache_is_done_without() -> None:
    default, named = cache_of(DEFAULT_CACHE, "1G"), cache_of("~/elsewhere", "1G")
    assert default and default.optional and named and not named.optional
    assert cache_of("none", "1G") is None
