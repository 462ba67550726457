"""Whole or absent, one winner, nothing lost in a listing: on a local disk, in memory and on S3."""

from __future__ import annotations

import os
import pickle
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from uuid import uuid4

import pyarrow as pa
import pyarrow.dataset as ds
import pytest
from moto.core import DEFAULT_ACCOUNT_ID
from moto.s3.models import s3_backends

from pipelines import local_disk
from pipelines.errors import InputError
from pipelines.storage import LIST_THREADS, Store, whole_uri

KINDS = ("local", "memory", "s3")


@pytest.fixture
def make(s3_options: dict[str, Any], tmp_path: Path) -> Callable[[str], Store]:
    """An empty store of a kind."""
    name = uuid4().hex
    roots = {"local": str(tmp_path / "store"), "memory": f"memory:///{name}", "s3": f"s3://bucket/{name}"}
    return lambda kind: Store(roots[kind], {"s3": s3_options})


@pytest.fixture(params=KINDS)
def store(request: pytest.FixtureRequest, make: Callable[[str], Store]) -> Store:
    return make(request.param)


@pytest.fixture(params=["local", "s3"])
def shared(request: pytest.FixtureRequest, make: Callable[[str], Store]) -> Store:
    """Those that several processes can write."""
    return make(request.param)


# -- one object ----------------------------------------------------------------------------------


def test_what_was_put_is_read(store: Store, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"of a file" * 1000)
    store.put_atomic("a/bytes", b"first")
    store.put_atomic("a/bytes", b"second")
    store.put_atomic("a/file", tmp_path / "file")
    assert store.read("a/bytes") == b"second"
    assert store.read("a/file") == b"of a file" * 1000
    assert list(store.read_listed(["a/file", "a/bytes"])) == [b"of a file" * 1000, b"second"]
    assert store.stat("a/bytes").bytes == 6


def test_what_is_not_there_is_told(store: Store) -> None:
    for call in (store.read, store.stat, store.open, lambda path: store.copy(path, "b")):
        with pytest.raises(FileNotFoundError):
            call("a/none")
    assert not store.exists("a/none")
    assert store.names("a") == [] and store.entries("a") == [] and not store.is_folder("a")


def test_a_copy_is_whole_and_replaces(store: Store) -> None:
    store.put_atomic("a", b"new")
    store.put_atomic("deep/b", b"older")
    store.copy("a", "deep/b")
    assert store.read("deep/b") == store.read("a") == b"new"


def test_deleting_what_is_gone_is_no_error(store: Store) -> None:
    store.put_atomic("a/b", b"1")
    store.put_atomic("a/c/d", b"2")
    store.delete(["a/none", "a/b"])
    assert store.names("a") == ["c/d"]
    store.delete_folder("a")
    store.delete_folder("a")
    assert store.names("") == [] and not store.is_folder("a")


def test_an_etag_changes_with_the_content_and_is_the_same_in_every_call(store: Store) -> None:
    store.put_atomic("a/b", b"1")
    before = store.stat("a/b")
    (listed,) = store.entries("a")
    assert listed.bytes == 1 and before.etag and listed.etag == before.etag == store.glob("a/*")[0].etag
    store.put_atomic("a/b", b"2")
    assert store.stat("a/b").etag != before.etag


def test_a_store_goes_to_workers_as_a_pickle(store: Store) -> None:
    store.put_atomic("a", b"1")
    assert pickle.loads(pickle.dumps(store)).read("a") == b"1"


# -- whole or absent -----------------------------------------------------------------------------


def test_readers_see_one_version_or_the_other(shared: Store) -> None:
    versions = [bytes([65 + number]) * 200_000 for number in range(8)]
    shared.put_atomic("a", versions[0])
    done = threading.Event()

    def read() -> set[bytes]:
        seen = set()
        while not done.is_set():
            seen.add(shared.read("a"))
        return seen

    with ThreadPoolExecutor(3) as pool:
        readers = [pool.submit(read) for _ in range(2)]
        for version in versions * 2:
            shared.put_atomic("a", version)
        done.set()
        assert set().union(*(reader.result() for reader in readers)) <= set(versions)


def test_a_put_that_fails_leaves_nothing_behind(make: Callable[[str], Store]) -> None:
    store = make("local")
    store.put_atomic("a", b"old")
    with pytest.raises(FileNotFoundError):
        store.put_atomic("a", Path(store.root, "no such source"))
    Path(store.root, "folder").mkdir()
    with pytest.raises(OSError):
        store.put_atomic("folder", b"x")
    assert store.names("") == ["a"] and store.read("a") == b"old"


def test_no_reader_takes_a_put_under_way_for_a_part(make: Callable[[str], Store]) -> None:
    store, done, seen = make("local"), threading.Event(), set[str]()

    def look() -> None:
        while not done.is_set():
            seen.update(store.names(""))

    with ThreadPoolExecutor(1) as pool:
        looking = pool.submit(look)
        for _ in range(30):
            store.put_atomic("part-0.parquet", b"x" * 1_000_000)
        done.set()
        looking.result()
    assert {name for name in seen if name.endswith(".parquet")} == {"part-0.parquet"}


def test_put_if_absent_has_one_winner_of_sixteen(shared: Store) -> None:
    for race in range(6):
        barrier = threading.Barrier(16)

        def put(writer: int, path: str = f"commits/{race}", barrier: threading.Barrier = barrier) -> bool:
            barrier.wait()
            return shared.put_if_absent(path, str(writer).encode())

        with ThreadPoolExecutor(16) as pool:
            won = list(pool.map(put, range(16)))
        assert won.count(True) == 1
        assert shared.read(f"commits/{race}") == str(won.index(True)).encode()
    assert len(shared.names("")) == 6


# -- listings ------------------------------------------------------------------------------------


def put_directly(store: Store, path: str) -> None:
    """Past HTTP, where a thousand puts take the server half a minute."""
    if store.root.startswith("s3://"):
        bucket, _, key = store.uri(path).removeprefix("s3://").partition("/")
        s3_backends[DEFAULT_ACCOUNT_ID]["aws"].put_object(bucket, key, b"{}")
    else:
        store.put_atomic(path, b"{}")


def test_a_listing_of_more_than_a_page_is_whole(shared: Store) -> None:
    expected = [f"{number:05d}.json" for number in range(1_100)]
    for name in expected:
        put_directly(shared, f"commits/{name}")
    assert sorted(shared.names("commits")) == expected
    assert [entry.uri for entry in shared.entries("commits")] == [shared.uri(f"commits/{name}") for name in expected]
    assert len(shared.glob("commits/*.json")) == 1_100
    uris = [shared.uri(f"commits/{name}") for name in expected]
    assert [entry.uri for entry in Store(options=shared.options).stat_many(uris)] == uris


def test_a_listing_shows_what_was_just_put(shared: Store) -> None:
    for number in range(3):
        shared.put_atomic(f"a/{number}", b"")
        assert len(shared.names("a")) == number + 1


def test_a_pattern_finds_objects_and_not_folders(store: Store) -> None:
    for name in ("x/1.tar", "x/2.tar", "x/3.txt", "x/deep.tar/4.tar"):
        store.put_atomic(name, b"1")
    found = {
        pattern: [entry.uri for entry in store.glob(pattern)] for pattern in ("x/*.tar", "x/[12].tar", "x/**/*.tar")
    }
    assert found["x/*.tar"] == found["x/[12].tar"] == [store.uri("x/1.tar"), store.uri("x/2.tar")]
    assert store.uri("x/deep.tar/4.tar") in found["x/**/*.tar"]


@pytest.mark.parametrize("folder", ["plain", "with [1] and * in it"])
@pytest.mark.parametrize("count", [3, LIST_THREADS + 1])
def test_many_objects_are_looked_up_at_once(store: Store, folder: str, count: int) -> None:
    anywhere, names = Store(options=store.options), [f"{folder}/{number}[x].tar" for number in range(count)]
    for size, name in enumerate(names):
        store.put_atomic(name, b"x" * size)
    uris = [store.uri(name) for name in reversed(names)]
    found = anywhere.stat_many(uris)
    assert [entry.uri for entry in found] == uris
    assert [entry.bytes for entry in found] == list(reversed(range(count)))
    assert [entry.etag for entry in found] == [store.stat(name).etag for name in reversed(names)]
    with pytest.raises(InputError, match=rf"2 of {count + 2} input objects do not exist: .*none-0.*none-1"):
        anywhere.stat_many([*uris, store.uri(f"{folder}/none-0"), store.uri(f"{folder}/none-1")])


def test_links_are_what_they_lead_to(tmp_path: Path) -> None:
    """Model hubs' caches are folders of links; a link has a time of its own, which would be another version."""
    (tmp_path / "blobs").mkdir()
    (tmp_path / "links").mkdir()
    for number in range(LIST_THREADS + 1):
        blob, link = tmp_path / "blobs" / str(number), tmp_path / "links" / f"{number}.tar"
        blob.write_bytes(b"x" * number)
        link.symlink_to(blob)
    (tmp_path / "links" / "folder.tar").symlink_to(tmp_path / "blobs")
    (tmp_path / "links" / "broken.tar").symlink_to(tmp_path / "none")
    store = Store()
    looked_up = [store.stat(str(path)) for path in sorted(tmp_path.glob("links/[0-9]*"))]
    assert store.glob(f"{tmp_path}/links/*.tar") == store.entries(f"{tmp_path}/links") == looked_up
    assert store.stat_many([entry.uri for entry in looked_up]) == looked_up


def test_a_uri_has_one_spelling(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert whole_uri("a/b.tar") == whole_uri(f"file://{tmp_path}/a/b.tar") == f"{tmp_path}/a/b.tar"
    assert whole_uri("s3://bucket/a") == whole_uri("s3a://bucket/a") == "s3://bucket/a"
    assert whole_uri("memory://a") == whole_uri("memory:///a") == "memory:///a"
    assert whole_uri("http://host/a?b=c") == "http://host/a?b=c"
    with pytest.raises(ValueError, match="nope"):
        whole_uri("nope://a")


def test_a_folder_that_another_clears_is_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, make, clearings = Store(str(tmp_path)), local_disk._make_folder, [3]

    def make_and_clear(folder: str) -> None:
        make(folder)
        if clearings[0]:
            clearings[0] -= 1
            store.delete_folder("staging")

    monkeypatch.setattr(local_disk, "_make_folder", make_and_clear)
    store.put_atomic("staging/shard/fragment", b"whole")
    assert store.read("staging/shard/fragment") == b"whole" and clearings == [0]
    with pytest.raises(FileNotFoundError):
        store.copy("gone", "target")


def test_what_a_dead_put_leaves_is_no_part_to_readers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store(str(tmp_path))
    store.put_atomic("parts/a.parquet", b"whole")
    monkeypatch.setattr(os, "unlink", lambda path: None)
    monkeypatch.setattr(os, "replace", lambda source, target: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        store.put_atomic("parts/b.parquet", b"half")
    assert len(list((tmp_path / "parts").iterdir())) == 2
    assert [Path(name).name for name in ds.dataset(tmp_path / "parts", pa.schema([]), format="parquet").files] == [
        "a.parquet"
    ]


@pytest.mark.parametrize("kind", KINDS)
def test_ranges_of_an_object_come_in_the_order_they_are_asked_for(make: Callable[[str], Store], kind: str) -> None:
    store = make(kind)
    store.put_atomic("a", bytes(range(200)))
    ranges = [(5, 7), (0, 3), (199, 200), (6, 40)]
    assert store.read_ranges("a", ranges) == [bytes(range(start, stop)) for start, stop in ranges]
    assert (store.local_path("a") is not None) == (kind == "local")
    with pytest.raises(FileNotFoundError):
        store.read_ranges("b", [(0, 1)])
