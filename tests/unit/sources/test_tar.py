import gzip
import io
import json
import os
import tarfile
from pathlib import Path

import pytest

from pipelines.config import ReadConfig
from pipelines.errors import ChangedInputError, StorageError
from pipelines.sources import plan_shards, samples
from pipelines.sources.archive import Archive
from pipelines.storage import Store
from tests.unit.sources.made import STORE, gnu_sparse, jpeg, plan, put, read, read_tar, reasons, tar_of

IMAGE = jpeg()


def three(seed: int) -> list[tuple[str, bytes]]:
    return [
        (f"{seed:05d}.jpg", jpeg(seed)),
        (f"{seed:05d}.json", json.dumps({"caption": f"scene {seed}", "url": "u"}).encode()),
        (f"{seed:05d}.txt", f"scene {seed}".encode()),
    ]


GOOD = [member for seed in range(4) for member in three(seed)]


def test_a_tar_as_img2dataset_writes_it() -> None:
    found = read_tar(tar_of(GOOD))
    assert [sample.key for sample in found] == ["00000", "00001", "00002", "00003"]
    assert [sample.image for sample in found] == [jpeg(seed) for seed in range(4)]
    assert [sample.captions for sample in found] == [[f"scene {seed}"] for seed in range(4)]
    assert found[2].metadata == {"caption": "scene 2", "url": "u"}
    assert not any(sample.rejects for sample in found)


@pytest.mark.parametrize("format_", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_offset_and_length_are_the_bytes_of_the_image(format_: int) -> None:
    long = "d" * 90 + "/" + "k" * 90
    data = tar_of([*three(1), (f"{long}.png", b"PNG bytes"), (f"{long}.txt", b"x")], format_)
    first, second = read_tar(data)
    assert data[first.offset : first.offset + first.length] == jpeg(1)
    assert data[second.offset : second.offset + second.length] == b"PNG bytes"
    assert second.key == long


@pytest.mark.parametrize("name", ["a.tar.gz", "a.tgz", "a.tar"])
def test_gzip_is_known_by_its_bytes(name: str) -> None:
    data = tar_of(GOOD)
    found = read_tar(gzip.compress(data), name)
    assert len(found) == 4
    assert data[found[1].offset : found[1].offset + found[1].length] == jpeg(1)


@pytest.mark.parametrize(
    ("metadata", "text", "expected"),
    [
        ({"captions": ["a", "b", "c"]}, b"b\n", ["a", "b", "c"]),
        ({"captions": ["a", "b"]}, b"mine", ["mine", "a", "b"]),
        ({"captions": ["a", {"raw": "b"}, None, " ", 7]}, None, ["a", "b", " ", "7"]),
        ({"caption": "json's"}, None, ["json's"]),
        ({"caption": "json's"}, b"text's", ["text's", "json's"]),
        ({"caption": None}, b"", []),
        ({"caption": "n\0ul"}, b"\xef\xbb\xbfbom", ["bom", "nul"]),
        (["no", "object"], b"text", ["text"]),
    ],
)
def test_captions_of_text_and_metadata(metadata: object, text: bytes | None, expected: list[str]) -> None:
    members = [("k.jpg", IMAGE), ("k.json", json.dumps(metadata).encode())]
    (sample,) = read_tar(tar_of([*members, ("k.txt", text)] if text is not None else members))
    assert sample.captions == expected
    assert not sample.rejects


def test_keys_extensions_fields_and_label() -> None:
    members = [
        ("./dog/a.B.JPG", IMAGE),
        ("./dog/a.url", b"http://x/y "),
        ("./dog/a.CLS", b"3"),
        ("./dog/a.npy", b"\x93NUMPY"),
        ("./dog/._a.jpg", b"AppleDouble"),
        ("./dog/a.caption", b"hi"),
        ("dog/c.seg.png", b"mask"),
        ("dog/c.webp", b"webp"),
    ]
    first, second = read_tar(tar_of(members))
    assert (first.key, first.image, first.label, first.captions) == ("dog/a", IMAGE, "3", ["hi"])
    assert first.metadata == {"url": "http://x/y", "cls": "3", "_skipped": ["npy"]}
    assert (second.key, second.image, second.metadata) == ("dog/c", b"webp", {"_skipped": ["seg.png"]})


def test_dots_in_names_lose_no_image() -> None:
    found = read_tar(tar_of([("img.001.jpg", b"1"), ("img.002.jpg", b"2"), ("img.003.jpg", b"3")]))
    assert [(sample.key, sample.image, reasons(sample)) for sample in found] == [
        ("img", b"1", []),
        ("img", None, ["duplicate_key"]),
        ("img", None, ["duplicate_key"]),
    ]


def test_a_key_that_comes_again_is_a_rejected_row_of_its_own() -> None:
    adjacent = read_tar(tar_of([*three(1), *three(1)]))
    apart = read_tar(tar_of([*three(1), *three(2), *three(1)]))
    assert [reasons(sample) for sample in adjacent] == [[], ["duplicate_key"] * 2]
    assert [reasons(sample) for sample in apart] == [[], [], ["duplicate_key"] * 2]


def test_bad_members_are_rejects_with_their_reason() -> None:
    members = [
        ("empty.jpg", b""),
        ("latin.jpg", IMAGE),
        ("latin.txt", b"caf\xe9"),
        ("note.pdf", b"%PDF"),
        ("none", b"no extension"),
        ("badjson.jpg", IMAGE),
        ("badjson.json", b"{"),
        ("deep.jpg", IMAGE),
        ("deep.json", b"[" * 100_000),
        ("deep.txt", b"kept"),
        ("lone.json", json.dumps({"captions": ["ok", "\ud800", ["list"]], "x": "\udfff", "y": float("nan")}).encode()),
    ]
    empty, latin, note, none, badjson, deep, lone = read_tar(tar_of(members))
    assert (empty.has_image, empty.image, empty.rejects) == (True, b"", [])
    assert (latin.captions, reasons(latin)) == ([None], ["not_utf8"])
    assert reasons(note) == reasons(none) == ["unknown_extension"]
    assert (badjson.image, badjson.captions, reasons(badjson)) == (IMAGE, [None], ["bad_json"])
    assert (deep.captions, deep.rejects, list(deep.metadata)) == (["kept"], [], ["_error"])
    assert (lone.captions, reasons(lone)) == (["ok", None, None], ["not_utf8", "not_text"])
    assert lone.metadata["y"] is None
    json.dumps(lone.metadata, ensure_ascii=False).encode()


def test_large_members_are_rejected_unread() -> None:
    members = [("a.jpg", b"x" * 5000), ("a.txt", b"y" * 5000), ("b.jpg", b"x" * 100), ("b.txt", b"short")]
    large, small = read_tar(tar_of(members), max_image_bytes=1000, max_caption_bytes=1000)
    assert reasons(large) == ["caption_too_large", "image_too_large"]
    assert (small.image, small.captions) == (b"x" * 100, ["short"])


def test_links_and_devices_are_not_followed() -> None:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        for name, kind in (("a.jpg", tarfile.SYMTYPE), ("b.jpg", tarfile.LNKTYPE), ("c.txt", tarfile.FIFOTYPE)):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "/etc/passwd"
            tar.addfile(info)
        folder = tarfile.TarInfo("folder.jpg")
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
    found = read_tar(file.getvalue())
    assert [(sample.key, reasons(sample)) for sample in found] == [(key, ["not_a_file"]) for key in "abc"]


@pytest.mark.parametrize("blocks_of_map", [0, 2])
def test_a_sparse_member_is_no_file_and_what_follows_it_is_read(blocks_of_map: int) -> None:
    """tarfile takes GNU's for a plain file, and its map for the file's bytes, where it is given a header alone."""
    sparse, after = read_tar(gnu_sparse("a.jpg", 700, blocks_of_map) + bytes(1024) + tar_of(three(1)))
    assert (sparse.key, reasons(sparse)) == ("a", ["not_a_file"])
    assert (after.key, after.image, after.rejects) == ("00001", jpeg(1), [])


@pytest.mark.parametrize(
    ("members", "told"),
    [
        ([("a.json", b'{"caption": "cut"}')], [["truncated_shard"]]),
        ([("a.txt", b"\xff"), ("a.json", b'{"caption": "cut"}')], [["not_utf8"], ["truncated_shard"]]),
    ],
)
def test_a_cut_shows_though_the_sample_was_bad_before(members: list[tuple[str, bytes]], told: list[list[str]]) -> None:
    """What is lost behind it is told of, and a network that broke off is not taken for a bad sample."""
    data = tar_of(members)
    found = read_tar(data[: data.index(b'{"caption"') + 5])
    assert [reasons(sample) for sample in found] == told


def test_zeros_without_end_behind_the_last_member_are_not_read_to_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipelines.sources.archive._MAX_PADDING_BLOCKS", 100)
    near = tar_of(GOOD) + bytes(512 * 50) + tar_of(three(9))
    far = tar_of(GOOD) + bytes(512 * 200) + tar_of(three(9))
    rest = read_tar(near)[-1], read_tar(far)[-1]
    assert [len(read_tar(data)) for data in (near, far)] == [5, 5]
    assert [reasons(sample) for sample in rest] == [[], ["corrupt_shard"]]
    assert "the rest is not read" in rest[1].rejects[0].detail


def test_every_cut_keeps_the_rows_before_it_and_shows() -> None:
    data = tar_of(three(0) + three(1))
    whole = read_tar(data)
    end = data.rstrip(b"\0")
    for at in range(0, len(end) + 1, 173):
        found = read_tar(data[:at])
        assert any("truncated_shard" in reasons(sample) for sample in found), at
        good = [sample for sample in found if not sample.rejects and sample.key in ("00000", "00001")]
        assert all(sample.image == whole[int(sample.key)].image for sample in good)
    assert reasons(read_tar(b"")[0]) == ["truncated_shard"]
    assert read_tar(b"\0" * 10240) == []


def test_a_cut_gzip_is_a_cut_shard() -> None:
    noisy = [(f"{i}.jpg", os.urandom(20_000)) for i in range(5)]
    data = gzip.compress(tar_of(noisy))
    found = read_tar(data[: len(data) // 2], "a.tar.gz")
    assert 0 < len(found) < 5
    assert reasons(found[-1]) == ["truncated_shard"]
    assert [sample.image for sample in found[:-1]] == [data for _, data in noisy[: len(found) - 1]]


def test_damage_to_a_gzip_is_a_corrupt_shard() -> None:
    data = bytearray(gzip.compress(tar_of([(f"{i}.jpg", os.urandom(200)) for i in range(500)])))
    data[len(data) // 2 : len(data) // 2 + 40] = bytes(40)
    found = read_tar(bytes(data), "a.tar.gz")
    assert set(reasons(found[-1])) <= {"corrupt_shard", "truncated_shard"}
    assert found[-1].rejects


def test_a_broken_header_ends_the_shard_and_says_so() -> None:
    data = bytearray(tar_of(GOOD))
    third = data.index(b"00002.jpg")
    data[third : third + 100] = b"garbage" * 14 + b"ga"
    found = read_tar(bytes(data))
    assert [reasons(sample) for sample in found] == [[], [], ["corrupt_shard"]]
    assert "no tar header at byte" in found[-1].rejects[0].detail
    assert [reasons(sample) for sample in read_tar(b"<html>not a tar</html>" * 100)] == [["corrupt_shard"]]


def test_archives_joined_end_to_end_are_read_to_the_end() -> None:
    found = read_tar(tar_of(three(0)) + tar_of(three(1)))
    assert [sample.key for sample in found] == ["00000", "00001"]
    assert not any(sample.rejects for sample in found)


class ShortStore(Store):
    """A store whose connection ends early and says nothing of it."""

    def open(self, path: str, listed: bool = False) -> io.BufferedReader:
        return io.BufferedReader(io.BytesIO(super().open(path).read()[:3000]))  # type: ignore[arg-type]


def test_a_network_cut_is_no_truncated_shard() -> None:
    (shard,) = plan(put("a.tar", tar_of(GOOD)))
    with pytest.raises(StorageError, match="broke off at byte 3000"):
        list(samples(shard, ReadConfig(), ShortStore()))


def test_an_object_that_changed_since_the_plan_is_refused() -> None:
    uri = put("a.tar", tar_of(GOOD))
    (shard,) = plan(uri)
    STORE.put_atomic(uri, tar_of(GOOD[:3]))
    with pytest.raises(ChangedInputError):
        list(samples(shard, ReadConfig(), STORE))
    STORE.delete([uri])
    with pytest.raises(ChangedInputError):
        list(samples(shard, ReadConfig(), STORE))


def test_an_object_that_changes_while_it_is_read_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    path.write_bytes(tar_of(GOOD))
    (shard,) = plan(path)
    stream = samples(shard, ReadConfig(), STORE)
    next(stream)
    os.utime(path, (1, 1))
    with pytest.raises(ChangedInputError):
        list(stream)


def test_a_shard_is_streamed() -> None:
    """A sample is there before the rest of the file is."""
    read_, write = os.pipe()
    with os.fdopen(write, "wb") as source, os.fdopen(read_, "rb") as stream:
        source.write(tar_of([("a.jpg", IMAGE), ("b.jpg", IMAGE)])[:1024])
        source.flush()
        assert next(Archive(stream).headers()).name == "a.jpg"


@pytest.mark.skipif("VECMILL_TEST_DATA" not in os.environ, reason="VECMILL_TEST_DATA names no folder of real photos")
def test_real_photos_are_read_whole() -> None:
    folder = Path(os.environ["VECMILL_TEST_DATA"])
    found = read(folder / "photos-open", folder / "photos" / "photos-{00000..00001}.tar")
    assert len(found) == 451
    assert all(len(sample.captions) == 5 and not sample.rejects for sample in found)
    for sample in found[::50]:
        with open(sample.uri, "rb") as file:
            file.seek(sample.offset or 0)
            assert file.read(sample.length or 0) == sample.image


def test_plans_are_the_same_however_the_file_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.b.tar").write_bytes(tar_of(GOOD))
    monkeypatch.chdir(tmp_path)
    named = ["a.b.tar", "./a.b.tar", str(tmp_path / "*.tar"), f"file://{tmp_path}/a.b.tar", str(tmp_path)]
    shards, _ = plan_shards(named, "auto", ReadConfig(), STORE, {})
    assert len(shards) == 1
    assert shards[0].id.startswith("a-b-")
    assert {plan(name)[0] for name in named} == set(shards)
