"""What a listing may name: its own place and those allowed, by whole parts of a path."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest

from pipelines.sources.fetch import resolve
from pipelines.sources.places import allowing, lies_in, own_place, place_of
from pipelines.sources.text import Fault


@pytest.mark.parametrize(
    ("uri", "place"),
    [
        ("/data/x.jpg", "/data"),
        ("/data/x.jpg", "/data/"),
        ("/data/x.jpg", "/"),
        ("/data/a/../x.jpg", "/data"),
        ("/data/x.jpg", "file:///data"),
        ("s3://b/images/x.jpg", "s3://b"),
        ("s3://b/images/x.jpg", "s3://b/images/"),
        ("s3a://b/images/x.jpg", "s3://b/images"),
        ("gs://b/x.jpg", "gcs://b"),
        ("hdfs://node/data/x.jpg", "hdfs://node/data"),
        ("http://10.0.0.5/x.jpg", "http://10.0.0.5"),
        ("http://10.0.0.5:80/x.jpg", "http://10.0.0.5"),
        ("HTTP://HOST/x.jpg", "http://host"),
        ("https://host:8443/a/x.jpg", "https://host:8443/a"),
        ("http://user:pass@host/x.jpg", "http://host"),
        ("http://[::1]:8080/x.jpg", "http://[::1]:8080"),
    ],
)
def test_in_place(uri: str, place: str) -> None:
    assert lies_in(uri, [place])


@pytest.mark.parametrize(
    ("uri", "place"),
    [
        ("/database/x.jpg", "/data"),
        ("/data/../x.jpg", "/data"),
        ("/data/../../etc/passwd", "/data"),
        ("/DATA/x.jpg", "/data"),
        ("s3://b/images2/x.jpg", "s3://b/images"),
        ("s3://b2/x.jpg", "s3://b"),
        ("s3://b/images/../x.jpg", "s3://b/images"),
        ("gs://b/x.jpg", "s3://b"),
        ("/b/x.jpg", "s3://b"),
        ("s3://b/x.jpg", "/b"),
        ("http://10.0.0.50/x.jpg", "http://10.0.0.5"),
        ("http://10.0.0.5.evil.com/x.jpg", "http://10.0.0.5"),
        ("http://10.0.0.5@evil.com/x.jpg", "http://10.0.0.5"),
        ("http://evil.com\\@10.0.0.5/x.jpg", "http://10.0.0.5"),
        ("http://evil.com#@10.0.0.5/x.jpg", "http://10.0.0.5"),
        ("http://10.0.0.5:8080/x.jpg", "http://10.0.0.5"),
        ("https://10.0.0.5/x.jpg", "http://10.0.0.5"),
        ("https://host/ab/x.jpg", "https://host/a"),
        ("https://host/a/../x.jpg", "https://host/a"),
        ("https://host/a/%2e%2e/x.jpg", "https://host/a"),
        ("https://host/a/..%2fx.jpg", "https://host/a"),
        ("http://[::1/x.jpg", "http://[::1]"),
    ],
)
def test_out_of_place(uri: str, place: str) -> None:
    assert not lies_in(uri, [place])


@pytest.mark.parametrize(
    ("uri", "own", "allowed"),
    [
        ("/data/set/m.jsonl", "/data/set", "/data/set"),
        ("s3://b/set/m.jsonl", "s3://b", "s3://b"),
        ("https://host:8443/set/m.jsonl?token=1", "https://host:8443", "https://host:8443"),
        ("hdfs://node/set/m.jsonl", "hdfs://node/set", "hdfs://node/set"),
        ("memory:///set/m.jsonl", "memory://", "memory:///set"),
    ],
)
def test_own_places_and_those_to_allow(uri: str, own: str, allowed: str) -> None:
    assert (own_place(uri), place_of(uri)) == (own, allowed)


FORBIDDEN = [
    ("../x.jpg", "/data/set/m.jsonl"),
    ("/etc/passwd", "/data/m.jsonl"),
    ("file:///etc/passwd", "/data/m.jsonl"),
    ("file:/etc/passwd", "/data/m.jsonl"),
    ("file://~/x.jpg", "/data/m.jsonl"),
    ("s3://other/x.jpg", "/data/m.jsonl"),
    ("s3://other/x.jpg", "s3://bucket/m.jsonl"),
    ("s3://bucket/../other/x.jpg", "s3://bucket/m.jsonl"),
    ("hdfs://node/x.jpg", "s3://bucket/m.jsonl"),
    ("/etc/passwd", "https://host/m.jsonl"),
]


@pytest.mark.parametrize(("reference", "listing"), FORBIDDEN)
def test_a_place_of_its_own_is_not_enough(reference: str, listing: str) -> None:
    found = resolve(reference, listing)
    assert isinstance(found, Fault) and found.reason == "forbidden_url"
    assert "read.allow" in found.detail and reference in found.detail


@pytest.mark.parametrize(("reference", "listing"), FORBIDDEN)
def test_what_is_allowed_is_resolved(reference: str, listing: str) -> None:
    allow = ["/", "s3://other", "hdfs://node"]
    assert isinstance(resolve(reference, listing, allow), str)


@pytest.mark.parametrize("allow", [[], ["/", "s3://b"]])
@pytest.mark.parametrize("reference", ["x\0.jpg", "simplecache::file:///etc/passwd", "zip://a::s3://b/x.zip"])
def test_what_is_no_address_cannot_be_allowed(reference: str, allow: list[str]) -> None:
    found = resolve(reference, "s3://b/m.jsonl", allow)
    assert isinstance(found, Fault) and "read.allow" not in found.detail


def test_a_home_folder_is_what_is_looked_at_and_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """fsspec takes `~` for the home folder where it stands first."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    assert isinstance(resolve("file://~/x.jpg", str(tmp_path / "set" / "m.jsonl"), [str(tmp_path / "~")]), Fault)
    assert resolve("file://~/x.jpg", str(tmp_path / "home" / "m.jsonl")) == f"{tmp_path}/home/x.jpg"


def test_the_flag_is_one_word_of_a_shell() -> None:
    words = shlex.split(allowing("/it's; rm -rf $HOME", ["/a"]))
    assert words == ["--set", """read.allow=["/a", "/it's; rm -rf $HOME"]"""]


@pytest.mark.parametrize("listing", ["/data/m.jsonl", "s3://b/m.jsonl"])
def test_a_protocol_that_nothing_speaks_is_a_fault_and_nothing_to_allow(listing: str) -> None:
    found = resolve("gopher://h/x.jpg", listing, ["gopher://h"])
    assert isinstance(found, Fault) and found.reason == "forbidden_url" and "read.allow" not in found.detail


def test_links_count_where_they_lead(tmp_path: Path) -> None:
    inside, outside = tmp_path / "in", tmp_path / "out"
    for folder in (inside / "sub", outside / "sub"):
        folder.mkdir(parents=True)
        (folder / "x.jpg").write_bytes(b"x")
    (inside / "there").symlink_to(outside / "sub")
    (inside / "here").symlink_to(inside / "sub")
    (inside / "there.jpg").symlink_to(outside / "sub" / "x.jpg")
    (inside / "loop").symlink_to(inside / "loop")
    (tmp_path / "again").symlink_to(inside)
    listing = str(inside / "m.jsonl")
    for reference in ("there/x.jpg", "there.jpg", "there/../sub/x.jpg", "sub/../../out/sub/x.jpg"):
        assert isinstance(resolve(reference, listing), Fault), reference
        assert isinstance(resolve(reference, listing, [str(outside)]), str), reference
    for reference in ("here/x.jpg", "here/../sub/x.jpg", "loop", f"{tmp_path}/again/sub/x.jpg", "gone/../sub/x.jpg"):
        assert isinstance(resolve(reference, listing), str), reference
    assert isinstance(resolve("sub/x.jpg", str(tmp_path / "again" / "m.jsonl")), str)
    assert isinstance(resolve(str(outside / "sub" / "x.jpg"), listing, [str(inside / "there")]), str)
