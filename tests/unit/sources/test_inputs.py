import subprocess
import sys
import time
from pathlib import Path

import pytest

from pipelines.contracts import Entry
from pipelines.errors import InputError
from pipelines.sources import KNOWN_IMAGE_SUFFIXES
from pipelines.sources.fetch import resolve
from pipelines.sources.inputs import find
from pipelines.sources.kinds import kind_of, slug, stem
from pipelines.sources.text import Fault
from pipelines.storage import Store
from tests.unit.sources.made import jpeg, plan, put, read, tar_of
from tests.unit.sources.test_parquet import file_of

TAR = tar_of([("a.jpg", jpeg())])
PARQUET = file_of({"image": [jpeg()]})


def uris(*inputs: str | Path, format_: str = "auto") -> list[str]:
    return sorted(shard.uri.rpartition("/")[2] for shard in plan(*inputs, format_=format_))


@pytest.fixture
def folder() -> str:
    uri = put("00000.tar", TAR)
    for number in range(1, 40):
        put(f"{number:05d}.tar", TAR, uri.split("/")[3])
    return uri.rpartition("/")[0]


def test_ways_to_name_shards(folder: str) -> None:
    put("list.txt", b"\n# some\n00001.tar\n{00002..00003}.tar\n0001[0-1].tar\n", folder.split("/")[3])
    assert uris(f"{folder}/00000.tar") == ["00000.tar"]
    assert uris(f"{folder}/{{00000..00002}}.tar") == ["00000.tar", "00001.tar", "00002.tar"]
    assert len(uris(f"{folder}/{{00000..00039}}.tar")) == 40
    assert uris(f"{folder}/0000*.tar", f"{folder}/00001.tar") == [f"{i:05d}.tar" for i in range(10)]
    assert len(uris(folder)) == len(uris(f"{folder}/")) == 40
    expected = ["00001.tar", "00002.tar", "00003.tar", "00010.tar", "00011.tar"]
    assert uris(f"{folder}/list.txt") == expected


def test_ids_are_sorted_unique_and_safe(folder: str) -> None:
    shards = plan(folder, f"{folder}/*.tar")
    ids = [shard.id for shard in shards]
    assert ids == sorted(set(ids))
    assert all(id_.replace("-", "").replace("_", "").isalnum() for id_ in ids)
    assert ids[0].startswith("00000-") and len(ids[0]) == len("00000-") + 12
    assert {len(shard.version) for shard in shards} == {12}


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nothing/here.tar", "do not exist"),
        ("nothing", "do not exist"),
        ("nothing/*.tar", "matches nothing"),
        ("nothing/{000..100}.tar", "do not exist"),
        ("{000..100.tar", "brace is not closed"),
        ("nothing.txt", r"list file .*/nothing\.txt does not exist"),
    ],
)
def test_what_is_not_there_is_refused(folder: str, name: str, message: str) -> None:
    with pytest.raises(InputError, match=message) as error:
        plan(f"{folder}/{name}")
    assert error.value.fix


def test_a_list_that_names_a_missing_list_is_refused_with_both(folder: str) -> None:
    put("list.txt", b"00000.tar\nother.txt\n", folder.split("/")[3])
    with pytest.raises(InputError, match=r"/other\.txt, which .*/list\.txt names, does not exist"):
        plan(f"{folder}/list.txt")


def test_lists_that_name_each_other_are_refused(folder: str) -> None:
    for name, text in (("a.txt", b"00000.tar\nb.txt"), ("b.txt", b"c.txt"), ("c.txt", b"00001.tar\na.txt")):
        put(name, text, folder.split("/")[3])
    with pytest.raises(InputError, match=r"/a\.txt → .*/b\.txt → .*/c\.txt → .*/a\.txt") as error:
        plan(f"{folder}/a.txt")
    assert error.value.fix


def test_a_list_may_name_itself_and_a_list_twice(folder: str) -> None:
    put("a.txt", b"a.txt\nb.txt\nb.txt\nc.txt", folder.split("/")[3])
    put("b.txt", b"00000.tar", folder.split("/")[3])
    put("c.txt", b"b.txt\n00001.tar", folder.split("/")[3])
    assert uris(f"{folder}/a.txt") == ["00000.tar", "00001.tar"]


def test_a_long_list_takes_no_time_of_its_square() -> None:
    class Everything(Store):
        def stat_many(self, uris: list[str]) -> list[Entry]:
            return [Entry(uri, 1, "") for uri in uris]

    names = "\n".join(f"s3://bucket/{number:06d}.tar" for number in range(60_000))
    started = time.process_time()
    assert len(find([put("list.txt", names.encode())], "auto", Everything()).tars) == 60_000
    assert time.process_time() - started < 10


def test_protocols_that_are_unknown_are_refused() -> None:
    with pytest.raises(InputError, match="nope"):
        plan("nope://bucket/a.tar")


def test_mixed_and_empty_folders_are_refused_with_what_they_hold(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is empty"):
        plan(tmp_path)
    (tmp_path / "readme.md").write_text("hello")
    with pytest.raises(InputError, match="1 other file, nothing to embed"):
        plan(tmp_path)
    (tmp_path / "a.tar").write_bytes(TAR)
    assert uris(tmp_path) == ["a.tar"]
    (tmp_path / "b.parquet").write_bytes(PARQUET)
    with pytest.raises(InputError, match="1 parquet file, 1 tar file, 1 other file"):
        plan(tmp_path)
    assert uris(tmp_path, format_="tar") == ["a.tar"]
    assert uris(tmp_path / "*.parquet") == ["b.parquet"]
    with pytest.raises(InputError):
        plan(tmp_path, format_="manifest")


def test_images_beside_a_manifest_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(jpeg())
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "a.jpg", "text": "c"}')
    with pytest.raises(InputError, match="1 image file, 1 manifest file"):
        plan(tmp_path)
    (sample,) = read(tmp_path / "metadata.jsonl")
    assert (sample.image, sample.captions) == (jpeg(), ["c"])


def test_an_img2dataset_folder_is_its_tars(tmp_path: Path) -> None:
    for name, data in (("00000.tar", TAR), ("00000.parquet", PARQUET), ("00000_stats.json", b"{}")):
        (tmp_path / name).write_bytes(data)
    assert uris(tmp_path) == ["00000.tar"]


def test_a_folder_that_spark_wrote(tmp_path: Path) -> None:
    folder = tmp_path / "table.parquet"
    folder.mkdir()
    (folder / "part-00000.snappy.parquet").write_bytes(PARQUET)
    (folder / "_SUCCESS").write_bytes(b"")
    assert uris(folder) == ["part-00000.snappy.parquet"]


@pytest.mark.parametrize("name", ["a.tar", "a.parquet", "a.jsonl"])
def test_shards_that_lead_out_of_a_folder_are_refused_unless_pointed_at(tmp_path: Path, name: str) -> None:
    data = {"a.tar": TAR, "a.parquet": PARQUET, "a.jsonl": b'{"key": "a", "caption": "c"}'}[name]
    inside, outside = tmp_path / "in", tmp_path / "out"
    for folder in (inside, outside):
        folder.mkdir()
    (outside / name).write_bytes(data)
    (inside / f"b{name}").write_bytes(data)
    (inside / f"c{name}").symlink_to(inside / f"b{name}")
    assert uris(inside) == [f"b{name}", f"c{name}"]
    (inside / name).symlink_to(outside / name)
    for format_ in ("auto", {"a.jsonl": "manifest"}.get(name, name[2:])):
        with pytest.raises(InputError) as refused:
            plan(inside, format_=format_)
        assert str(inside / name) in refused.value.what
        assert f"""--set read.allow='["{outside}"]'""" in refused.value.fix
    assert len(plan(inside, allow=[str(outside)])) == 3
    assert len(plan(f"{inside}/*{name[1:]}")) == 3
    assert len(plan(inside / name)) == 1


def test_names_with_pattern_signs_are_names_first(tmp_path: Path) -> None:
    (tmp_path / "a[1].tar").write_bytes(TAR)
    assert uris(tmp_path / "a[1].tar") == ["a[1].tar"]
    photos = tmp_path / "photos [2019]"
    photos.mkdir()
    (photos / "a.jpg").write_bytes(jpeg())
    assert [sample.key for sample in read(photos)] == ["a"]


def test_a_named_format_overrides_the_suffix(tmp_path: Path) -> None:
    (tmp_path / "shard.bin").write_bytes(TAR)
    with pytest.raises(InputError, match="no known format"):
        plan(tmp_path / "shard.bin")
    assert [sample.key for sample in read(tmp_path / "shard.bin", format_="tar")] == ["a"]
    (tmp_path / "one.jpg").write_bytes(jpeg())
    with pytest.raises(InputError, match="is one image"):
        plan(tmp_path / "one.jpg")


@pytest.mark.parametrize(
    ("uri", "kind"),
    [
        ("s3://b/x.TAR", "tar"), ("x.tar.gz", "tar"), ("x.tgz", "tar"), ("a/b.parquet", "parquet"), ("x.JPEG", "image"),
        ("x.jsonl.gz", "manifest"), ("x.csv", "manifest"), ("x.json", "manifest"), ("x.txt", "list"), ("x", None),
        ("https://h/x.tar?sig=a/b.csv", "tar"),
    ],
)  # fmt: skip
def test_kinds(uri: str, kind: str | None) -> None:
    assert kind_of(uri) == kind


def test_names() -> None:
    assert stem("s3://b/a.b-000.tar.gz") == "a.b-000"
    assert slug("s3://b/ü.tar") == "shard"
    assert {".jpg", ".png", ".webp"} <= KNOWN_IMAGE_SUFFIXES


@pytest.mark.parametrize(
    ("reference", "listing", "expected"),
    [
        ("a/b.jpg", "/data/m.jsonl", "/data/a/b.jpg"),
        ("/data/b.jpg", "/data/m.jsonl", "/data/b.jpg"),
        ("file:///data/b.jpg", "/data/m.jsonl", "/data/b.jpg"),
        ("a/b.jpg", "s3://b/d/m.jsonl", "s3://b/d/a/b.jpg"),
        ("../i/b.jpg", "s3://b/d/m.jsonl", "s3://b/i/b.jpg"),
        ("https://h/x.jpg?y=1", "s3://b/m.jsonl", "https://h/x.jpg?y=1"),
        ("a.jpg", "https://h/d/m.jsonl?token=1", "https://h/d/a.jpg"),
        ("../../other/b.jpg", "s3://b/d/m.jsonl", None),
        ("/etc/passwd", "s3://b/m.jsonl", None),
        ("file:/etc/passwd", "s3://b/m.jsonl", None),
        ("local:///etc/passwd", "https://h/m.jsonl", None),
        ("simplecache::file:///etc/passwd", "s3://b/m.jsonl", None),
        ("http://a::file:///etc/passwd", "s3://b/m.jsonl", None),
        ("sftp://host/x", "s3://b/m.jsonl", None),
    ],
)
def test_where_a_reference_points(reference: str, listing: str, expected: str | None) -> None:
    found = resolve(reference, listing)
    assert (None if isinstance(found, Fault) else found) == expected


def test_sources_need_no_ray_and_no_torch() -> None:
    code = "import sys, pipelines.sources; sys.exit(bool({'ray', 'torch', 'faiss'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("name", ["file:///etc/x.tar", "http://169.254.169.254/x.tar", "http://localhost:1/x.tar"])
def test_a_list_from_the_network_does_not_lead_inside(name: str) -> None:
    listing = put("list.txt", name.encode())
    with pytest.raises(InputError, match=r"leads to .*which an input may not name(.|\n)*--set read\.allow="):
        plan(listing)


def test_a_list_from_the_network_names_plain_addresses() -> None:
    with pytest.raises(InputError, match="no plain address"):
        plan(put("list.txt", b"zip://x.tar::file:///etc/x.zip"))


def test_a_list_from_the_network_may_name_what_is_allowed(tmp_path: Path) -> None:
    (tmp_path / "x.tar").write_bytes(tar_of([("a.txt", b"a")]))
    listing = put("list.txt", f"file://{tmp_path}/x.tar".encode())
    assert [sample.key for sample in read(listing, allow=[str(tmp_path)])] == ["a"]


def test_a_list_of_ones_own_may_name_anything(tmp_path: Path) -> None:
    for folder in ("lists", "data"):
        (tmp_path / folder).mkdir()
    (tmp_path / "data" / "x.tar").write_bytes(tar_of([("a.txt", b"a")]))
    (tmp_path / "lists" / "list.txt").write_text(f"{tmp_path}/data/x.tar\n")
    assert [sample.key for sample in read(tmp_path / "lists" / "list.txt")] == ["a"]
