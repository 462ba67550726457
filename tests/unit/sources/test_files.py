import json
import os
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from fsspec.implementations.local import LocalFileSystem

from pipelines.config import ReadConfig
from pipelines.errors import AccessError, ChangedInputError, InputError
from pipelines.sources import plan_shards, samples
from pipelines.sources.identity import slice_count, slice_of
from pipelines.storage import Store
from tests.unit.sources.made import STORE, jpeg, plan, read, reasons


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for label in ("cat", "dog"):
        for number in range(10):
            path = tmp_path / label / f"{number:02d}.jpg"
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(jpeg(number))
    (tmp_path / "cat" / "00.txt").write_text("a cat\nsecond line\n\n")
    (tmp_path / "cat" / "01.json").write_text(json.dumps({"caption": "from json", "license": "CC0"}))
    (tmp_path / "top.v1.png").write_bytes(b"png")
    (tmp_path / "top.v1.txt").write_bytes(b"fine\ncaf\xe9\n")
    return tmp_path


def test_captions_labels_and_metadata(folder: Path) -> None:
    found = {sample.key: sample for sample in read(folder)}
    assert len(found) == 21
    cat, other, top = found["cat/00"], found["cat/01"], found["top.v1"]
    assert (cat.image, cat.captions, cat.label) == (jpeg(0), ["a cat", "second line"], "cat")
    assert cat.metadata == {"path": "cat/00.jpg"}
    assert (cat.uri, cat.offset, cat.length) == (str(folder / "cat/00.jpg"), 0, len(jpeg(0)))
    assert (other.captions, other.metadata["license"]) == (["from json"], "CC0")
    assert (top.label, top.captions, reasons(top)) == (None, ["fine", None], ["not_utf8"])


def test_what_is_wrong_with_files_is_in_rejects(folder: Path) -> None:
    (folder / "cat" / "00.png").write_bytes(b"again")
    (folder / "notes.pdf").write_bytes(b"%PDF")
    (folder / "large.jpg").write_bytes(b"x" * 5000)
    (folder / ".DS_Store").write_bytes(b"litter")
    found = read(folder, max_image_bytes=4000)
    bad = {(sample.key, *reasons(sample)) for sample in found if sample.rejects}
    assert bad == {
        ("cat/00", "duplicate_key"), ("notes", "unknown_extension"),
        ("large", "image_too_large"), ("top.v1", "not_utf8"),
    }  # fmt: skip


def test_slices_hold_every_file_once_and_are_recorded(folder: Path) -> None:
    shards, slices = plan_shards([str(folder)], "auto", ReadConfig(samples_per_slice=6), STORE, {})
    assert slices == {str(folder): 4}
    assert [shard.id.rpartition("-")[2] for shard in shards] == [f"s000{k}of0004" for k in range(4)]
    keys = [sample.key for shard in shards for sample in samples(shard, ReadConfig(), STORE)]
    assert len(keys) == len(set(keys)) == 21
    again, _ = plan_shards([str(folder)], "auto", ReadConfig(samples_per_slice=1000), STORE, slices)
    assert again == shards


def test_a_new_or_changed_file_changes_one_slice(folder: Path) -> None:
    settings = ReadConfig(samples_per_slice=3)
    before, slices = plan_shards([str(folder)], "auto", settings, STORE, {})
    (folder / "new.jpg").write_bytes(jpeg())
    after, _ = plan_shards([str(folder)], "auto", settings, STORE, slices)
    changed = [shard for shard, old in zip(after, before, strict=True) if shard != old]
    assert [shard.slice for shard in changed] == [(slice_of("new", 8), 8)]
    os.utime(folder / "new.jpg", (1, 1))
    touched, _ = plan_shards([str(folder)], "auto", settings, STORE, slices)
    assert [shard.id for shard in touched if shard not in after] == [changed[0].id]


def test_a_slice_that_changed_since_the_plan_is_refused(folder: Path) -> None:
    (shard,) = plan(folder)
    (folder / "cat" / "05.jpg").unlink()
    with pytest.raises(ChangedInputError):
        list(samples(shard, ReadConfig(), STORE))


def test_a_file_that_may_not_be_read_is_no_reject(folder: Path) -> None:
    class Refusing(Store):
        def read(self, path: str, *_: object, **__: object) -> bytes:
            raise AccessError(f"Cannot read {path}")

    (shard,) = plan(folder)
    with pytest.raises(AccessError):
        list(samples(shard, ReadConfig(), Refusing()))


def test_a_pattern_of_images_is_a_folder_of_them(folder: Path) -> None:
    assert sorted(sample.key for sample in read(folder / "cat" / "0[1-3].jpg")) == ["01", "02", "03"]
    assert len(read(folder / "**" / "*.jpg")) == 20


@pytest.mark.parametrize(("samples_", "count"), [(0, 1), (1, 1), (10, 1), (11, 2), (21, 4), (40, 4), (41, 8)])
def test_slice_counts_are_powers_of_two(samples_: int, count: int) -> None:
    assert slice_count(samples_, 10) == count


# -- links ---------------------------------------------------------------------------------------


def test_links_that_lead_out_of_the_folder_are_rejects_unless_allowed(tmp_path: Path) -> None:
    inside, outside = tmp_path / "in", tmp_path / "out"
    for folder in (inside, outside):
        folder.mkdir()
        (folder / "x.jpg").write_bytes(jpeg())
        (folder / "x.txt").write_text("a secret caption" if folder == outside else "a caption")
        (folder / "x.json").write_text('{"caption": "more", "license": "CC0"}')
    (inside / "here.jpg").symlink_to(inside / "x.jpg")
    (inside / "there.jpg").symlink_to(outside / "x.jpg")
    (inside / "there.txt").symlink_to(outside / "x.txt")
    (inside / "more.json").symlink_to(outside / "x.json")
    found = {sample.key: sample for sample in read(inside)}
    assert {key for key, sample in found.items() if not sample.rejects} == {"x", "here"}
    assert reasons(found["there"]) == ["forbidden_link", "forbidden_link"]
    assert f"leads to {outside}: the setting read.allow" in found["there"].rejects[0].detail
    assert (found["there"].captions, found["there"].metadata["path"]) == ([None], "there.jpg")
    assert "CC0" not in str(found["more"])
    there = {sample.key: sample for sample in read(inside, allow=[str(outside)])}["there"]
    assert (there.image, there.captions, there.rejects) == (jpeg(), ["a secret caption"], [])


def test_a_folder_of_links_that_lead_out_of_it_is_refused_with_the_flag(tmp_path: Path) -> None:
    inside, outside = tmp_path / "in", tmp_path / "out"
    inside.mkdir()
    outside.mkdir()
    for number in range(3):
        (outside / f"{number}.jpg").write_bytes(jpeg(number))
        (inside / f"{number}.jpg").symlink_to(outside / f"{number}.jpg")
    with pytest.raises(InputError, match=f"""read.allow='\\["{outside}"\\]'"""):
        plan(inside)
    assert [sample.image for sample in read(inside, allow=[str(outside)])] == [jpeg(number) for number in range(3)]
    (tmp_path / "again").symlink_to(outside)
    assert len(read(tmp_path / "again")) == 3


def test_links_to_folders_are_not_gone_into(tmp_path: Path) -> None:
    inside, outside = tmp_path / "in", tmp_path / "out"
    for folder in (inside / "sub", outside):
        folder.mkdir(parents=True)
        (folder / "x.jpg").write_bytes(jpeg())
    (inside / "loop").symlink_to(inside)
    (inside / "sub" / "up").symlink_to(inside)
    (inside / "there").symlink_to(outside)
    (inside / "round.jpg").symlink_to(inside / "round.jpg")
    for given in (inside, inside / "**" / "*.jpg"):
        assert [sample.key for sample in read(given)] == ["sub/x"]


def test_a_file_that_comes_short_or_late_is_read_again(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The storage says nothing of it; its listing has the length."""
    (shard,) = plan(folder)
    whole, cat, asked = list(samples(shard, ReadConfig(), STORE)), LocalFileSystem.cat_file, Counter[str]()

    def faulty(fs: LocalFileSystem, path: str, *how: Any, **more: Any) -> bytes:
        asked[path] += 1
        if asked[path] == 1 and path.endswith("05.jpg"):
            raise FileNotFoundError(path)
        return bytes(cat(fs, path, *how, **more))[: -1 if asked[path] == 1 else None]

    monkeypatch.setattr(LocalFileSystem, "cat_file", faulty)
    assert list(samples(shard, ReadConfig(), STORE)) == whole and set(asked.values()) == {2}
