import gzip
import json
import os
import random
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipelines import secrets
from pipelines.config import ReadConfig
from pipelines.contracts import Sample
from pipelines.errors import ChangedInputError, InputError
from pipelines.sources import plan_shards, rows, samples
from tests.unit.sources.made import STORE, jpeg, plan, put, read, reasons

IMAGE = jpeg()
MODES = ("a.jsonl", "a.jsonl.gz", "a.csv", "a.json")


def written(name: str, records: list[dict[str, Any]]) -> bytes:
    if name.endswith(".csv"):
        lines = [",".join(records[0]), *(",".join(json.dumps(v) for v in r.values()) for r in records)]
        return "\n".join(lines).encode()
    if name.endswith(".json"):
        return json.dumps(records).encode()
    data = "\n".join(map(json.dumps, records)).encode()
    return gzip.compress(data) if name.endswith(".gz") else data


def with_image(name: str, data: bytes) -> str:
    image = put("images/x.jpg", IMAGE)
    return put(name, data, image.split("/")[3])


@pytest.mark.parametrize("name", MODES)
def test_path_captions_and_anything(name: str) -> None:
    records = [{"image": "images/x.jpg", "caption": "one", "n": "1"}, {"image": "gone.jpg", "caption": "two", "n": "2"}]
    first, second = read(with_image(name, written(name, records)))
    assert (first.key, first.image, first.captions, first.metadata) == ("images/x.jpg", IMAGE, ["one"], {"n": "1"})
    assert (first.offset, first.length, first.uri.endswith("/images/x.jpg")) == (0, len(IMAGE), True)
    assert (second.captions, reasons(second)) == (["two"], ["not_found"])


def test_rows_of_one_image_are_one_sample_wherever_they_are() -> None:
    records = [{"image": "images/x.jpg", "caption": c, "n": n} for c, n in (("a", 1), ("b", 1), ("c", 2))]
    others: list[dict[str, Any]] = [{"caption": "other"}, {"image": "gone.jpg", "caption": "d"}]
    shuffled = [others[0], *records[:2], others[1], records[2]]
    other, first, gone = read(with_image("a.jsonl", written("a.jsonl", shuffled)))
    assert (first.captions, first.metadata) == (["a", "b", "c"], {"n": 1, "_rows": [{}, {"n": 2}]})
    assert (first.image, reasons(first)) == (IMAGE, [])
    assert (other.captions, gone.captions) == (["other"], ["d"])


def test_no_caption_of_shuffled_annotations_is_lost() -> None:
    annotations = [(f"{i}.jpg", f"caption {i} {j}") for i in range(40) for j in range(5)]
    random.Random(0).shuffle(annotations)
    uri = put("a.jsonl", written("a.jsonl", [{"image": image, "caption": c} for image, c in annotations]))
    found = read(uri, samples_per_slice=40)
    assert len({sample.key for sample in found}) == len(found) == 40
    assert sorted((s.key, c) for s in found for c in s.captions) == sorted(annotations)
    assert {reason for sample in found for reason in reasons(sample)} == {"not_found"}


def test_a_key_of_two_images_is_a_duplicate() -> None:
    records = [{"key": "k", "image": name, "caption": name} for name in ("images/x.jpg", "gone.jpg", "images/x.jpg")]
    first, second = read(with_image("a.jsonl", written("a.jsonl", records)))
    assert (first.captions, reasons(first)) == (["images/x.jpg"] * 2, [])
    assert reasons(second) == ["not_found", "duplicate_key"]


def test_bad_lines_are_rows_of_their_own() -> None:
    lines = [b'{"key": "a", "caption": "x"}', b"{not json", b'["list"]', b"", b'{"key": "b", "caption": "caf\xe9"}']
    deep = b'{"key": "c", "caption": "y", "z": ' + b"[" * 90 + b"]" * 90 + b"}"
    found = read(put("a.jsonl", b"\n".join([*lines, deep, b'{"key": "d", "text": "z"}'])))
    assert [reasons(sample) for sample in found] == [
        [], ["bad_manifest_line"], ["bad_manifest_line"], ["not_utf8"], [], [],
    ]  # fmt: skip
    assert (found[4].captions, found[4].metadata) == (["y"], {"_error": ["z: nested too deeply"], "_skipped": ["z"]})
    assert found[-1].captions == ["z"]
    assert "row 2" in found[1].rejects[0].detail


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        (['1,"open', "2,b", "3,c"], ["?", "b", "c"]),
        (['1,"open', '2,"b"', "3,c"], ["?", "b", "c"]),
        (['1,"open', '2,"b, ""c"""', "3,d"], ["?", 'b, "c"', "d"]),
        (['1,"open', "2,b", '3,"c', "4,d"], ["?", "b", "?", "d"]),
        (['"1,open', "2,b"], ["?", "b"]),
        (["1,a", '2,"open'], ["a", "?"]),
        (['1,"two', 'lines"', "2,b"], ["two\nlines", "b"]),
        (['1,"5" pipe"', '2,5" pipe', "3,c"], ['5 pipe"', '5" pipe', "c"]),
        (['1,"a" b,"open', "2,b"], ["?", "b"]),
    ],
)
def test_a_quote_that_is_not_closed_costs_its_own_line_alone(lines: list[str], expected: list[str]) -> None:
    found = read(put("a.csv", "\n".join(["key,caption", *lines]).encode()))
    assert [sample.captions[0] if sample.captions else "?" for sample in found] == expected
    assert all((reasons(sample) == ["bad_manifest_line"]) == (not sample.captions) for sample in found)


def test_a_record_of_csv_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """The rest of the file is not held in memory for a quote that is never closed, nor a line without end."""
    monkeypatch.setattr(rows, "MAX_ROW_BYTES", 200)
    text = 'key,caption\n1,"open\n' + "".join(f"{n},b\n" for n in range(2, 99)) + "99," + "x" * 5_000 + "\n100,c\n"
    found = read(put("a.csv", text.encode()))
    assert [sample.captions for sample in found] == [[], *[["b"]] * 97, [], ["c"]]


def test_csv_quotes_lists_and_wrong_numbers_of_fields() -> None:
    text = 'key,raw,label\na,"[""x, y"", ""z""]",cat\nb,one, too many,dog\nc,"two\nlines",\n'
    first, bad, last = read(put("a.csv", text.encode("utf-8-sig")))
    assert (first.key, first.captions, first.label) == ("a", ["x, y", "z"], "cat")
    assert reasons(bad) == ["bad_manifest_line"]
    assert (last.captions, last.label) == (["two\nlines"], None)
    assert read(put("a.tsv", b"key\tcaption\nk\tx, y"))[0].captions == ["x, y"]


KARPATHY = {
    "dataset": "coco",
    "images": [
        {
            "filename": f"{i}.jpg",
            "filepath": "images",
            "imgid": i,
            "split": split,
            "sentences": [{"raw": f"caption {i} {j}", "tokens": ["caption"], "sentid": 5 * i + j} for j in range(5)],
        }
        for i, split in enumerate(["train", "val", "test", "restval"])
    ],
}


@pytest.mark.parametrize("indent", [None, 1])
def test_karpathys_json_with_its_splits(indent: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows, "_CHUNK_CHARS", 64)
    uri = put("dataset.json", json.dumps(KARPATHY, indent=indent).encode())
    put("images/1.jpg", IMAGE, uri.split("/")[3])
    everything = read(uri)
    assert [sample.key for sample in everything] == [f"images/{i}.jpg" for i in range(4)]
    val, rest = read(uri, splits=["val", "restval"])
    assert (val.image, val.captions) == (IMAGE, [f"caption 1 {j}" for j in range(5)])
    assert (val.metadata["split"], val.metadata["imgid"], rest.metadata["split"]) == ("val", 1, "restval")
    with pytest.raises(InputError, match="no rows of the splits nope"):
        read(uri, splits=["nope"])


def test_other_json_is_lines_or_refused() -> None:
    assert [sample.captions for sample in read(put("a.json", b'{"text": "a"}\n{"text": "b"}\n'))] == [["a"], ["b"]]
    with pytest.raises(InputError, match="no manifest"):
        read(put("a.json", b"<html>"))
    with pytest.raises(InputError, match="without sentences"):
        read(put("a.json", b'{"images": [{"file_name": "x.jpg", "id": 3}], "annotations": []}'))


def test_a_cut_json_list_shows_where_it_ends() -> None:
    data = json.dumps([{"key": str(i), "caption": "c"} for i in range(5)]).encode()
    found = read(put("a.json", data[:-30]))
    assert [reasons(sample) for sample in found] == [[], [], [], [], ["bad_manifest_line"]]


def test_a_cut_gzip_shows_where_it_ends() -> None:
    lines = "\n".join(json.dumps({"key": str(i), "caption": os.urandom(40).hex()}) for i in range(2000))
    data = gzip.compress(lines.encode())
    found = read(put("a.jsonl.gz", data[: len(data) // 2]))
    assert len(found) > 100
    assert [sample.key for sample in found[:-1]] == [str(i) for i in range(len(found) - 1)]
    assert reasons(found[-1]) == ["bad_manifest_line"]


def test_an_empty_or_unknown_manifest_is_refused() -> None:
    with pytest.raises(InputError, match="has no rows"):
        plan(put("a.jsonl", b"\n\n"))
    with pytest.raises(InputError, match="first row has: foo, bar"):
        plan(put("a.jsonl", b'{"foo": 1, "bar": 2}'))


def test_slices_hold_every_row_once_and_a_new_row_changes_one() -> None:
    records = [{"key": f"k{i}", "caption": f"c{i}"} for i in range(100)]
    uri = put("a.jsonl", written("a.jsonl", records))
    config = ReadConfig(samples_per_slice=20)
    shards, slices = plan_shards([uri], "auto", config, STORE, {})
    assert slices == {uri: 8}
    keys = [sample.key for shard in shards for sample in samples(shard, config, STORE)]
    assert sorted(keys) == sorted(record["key"] for record in records)
    STORE.put_atomic(uri, written("a.jsonl", [{"key": "new", "caption": "c"}, *records]))
    after, _ = plan_shards([uri], "auto", config, STORE, slices)
    changed = [shard for shard, old in zip(after, shards, strict=True) if shard.version != old.version]
    assert len(changed) == 1
    unchanged = next(shard for shard in shards if shard not in [changed[0]] and shard in after)
    assert list(samples(unchanged, config, STORE))
    old = next(shard for shard in shards if shard.id == changed[0].id)
    with pytest.raises(ChangedInputError):
        list(samples(old, config, STORE))


def test_a_list_of_images_is_a_manifest_without_captions(tmp_path: Path) -> None:
    (tmp_path / "x.jpg").write_bytes(IMAGE)
    (tmp_path / "list.txt").write_text(f"# photos\nx.jpg\n{tmp_path}/x.jpg\ngone.jpg\n")
    found = read(tmp_path / "list.txt")
    assert [sample.image for sample in found] == [IMAGE, IMAGE, None]


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
FIELDS = ["key", "caption", "captions", "label", "n"]


def records(fields: list[str]) -> st.SearchStrategy[list[Any]]:
    return st.lists(st.dictionaries(st.sampled_from(fields), JSON, max_size=5) | JSON, max_size=6)


def read_records(records: list[Any], per_slice: int) -> list[Sample]:
    uri = put("a.jsonl", "\n".join(map(json.dumps, [{"key": "first", "caption": "c"}, *records])).encode())
    found: list[Sample] = read(uri, samples_per_slice=per_slice)
    for sample in found:
        json.dumps(sample.metadata, allow_nan=False, ensure_ascii=False).encode()
    return found


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(records(FIELDS), st.integers(1, 4))
def test_whatever_json_says_every_row_is_there(records: list[Any], per_slice: int) -> None:
    assert len(read_records(records, per_slice)) == len(records) + 1


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(records([*FIELDS, "image"]), st.integers(1, 4))
def test_rows_of_one_image_are_at_most_one_sample_each(records: list[Any], per_slice: int) -> None:
    assert 1 <= len(read_records(records, per_slice)) <= len(records) + 1


def test_one_image_without_sentences_is_one_reject() -> None:
    images = [*KARPATHY["images"], {"filename": "x.jpg"}]
    found = read(put("a.json", json.dumps({"images": images}).encode()))
    assert [reasons(sample)[0] for sample in found] == [*["not_found"] * 4, "bad_manifest_line"]


def test_a_manifest_that_is_gone_is_a_changed_input() -> None:
    uri = put("a.jsonl", b'{"key": "a", "caption": "b"}')
    (shard,) = plan(uri)
    STORE.delete([uri])
    with pytest.raises(ChangedInputError, match="is gone"):
        list(samples(shard, ReadConfig(), STORE))


# -- what a manifest may name --------------------------------------------------------------------


def listing(folder: Path, *images: str) -> Path:
    path = folder / "set" / "a.jsonl"
    path.parent.mkdir(exist_ok=True)
    path.write_text("\n".join(json.dumps({"image": image, "caption": "c"}) for image in images))
    return path


def test_rows_that_lead_out_of_the_folder_are_rejects_unless_allowed(tmp_path: Path) -> None:
    for folder in ("set", "images", "images2"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "x.jpg").write_bytes(IMAGE)
    (tmp_path / "set" / "link.jpg").symlink_to(tmp_path / "images" / "x.jpg")
    out = ["../images/x.jpg", f"{tmp_path}/images/x.jpg", f"file://{tmp_path}/images/x.jpg", "link.jpg"]
    path = listing(tmp_path, "x.jpg", *out, f"{tmp_path}/images2/x.jpg")
    found = read(path)
    assert [reasons(sample) for sample in found] == [[], *[["forbidden_url"]] * 5]
    assert f"leads to {tmp_path}/images: the setting read.allow" in found[1].rejects[0].detail
    assert [sample.image for sample in read(path, allow=[f"{tmp_path}/images"])] == [*[IMAGE] * 5, None]


@pytest.mark.parametrize(
    ("image", "place"),
    [
        ("../images/x.jpg", "{tmp_path}/images"),
        ("s3://other/images/x.jpg", "s3://other"),
        ("http://10.0.0.5:8080/x.jpg", "http://10.0.0.5:8080"),
        ("http://169.254.169.254/x.jpg", "http://169.254.169.254"),
        ("http://localhost/x.jpg", "http://localhost"),
        ("http://[::1]:81/x.jpg", "http://[::1]:81"),
    ],
)
def test_a_manifest_that_begins_elsewhere_is_refused_with_the_flag(tmp_path: Path, image: str, place: str) -> None:
    (tmp_path / "images").mkdir()
    path, place = listing(tmp_path, image), place.format(tmp_path=tmp_path)
    for slices in ({}, {str(path): 1}):
        with pytest.raises(InputError) as refused:
            plan_shards([str(path)], "auto", ReadConfig(allow=["/nowhere"]), STORE, slices)
        assert place in refused.value.what
        assert f"""--set read.allow='["/nowhere", "{place}"]'""" in refused.value.fix
    given = yaml.safe_load(refused.value.fix.split("read.allow='")[1].rstrip("'"))
    assert len(plan_shards([str(path)], "auto", ReadConfig(allow=given), STORE, {})[0]) == 1


FORBIDDEN = ["gopher://h/x.jpg", "file:///etc/passwd", "http://10.0.0.1/x.jpg", "s3://other/x.jpg"]


@pytest.mark.parametrize("image", FORBIDDEN)
def test_a_bad_first_row_is_one_reject(tmp_path: Path, image: str) -> None:
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "x.jpg").write_bytes(IMAGE)
    path = listing(tmp_path, image, "x.jpg", "x.jpg?")
    assert [reasons(sample) for sample in read(path)] == [["forbidden_url"], [], ["not_found"]]
    for name, table in {
        "plain": pa.table({"url": [image, "set/x.jpg"]}),
        "struct": pa.table({"image": [{"bytes": None, "path": image}, {"bytes": IMAGE, "path": "/etc/x.jpg"}]}),
    }.items():
        pq.write_table(table, tmp_path / f"{name}.parquet")
        found = read(tmp_path / f"{name}.parquet")
        assert [reasons(sample) for sample in found] == [["forbidden_url"], []]


def test_many_bad_rows_before_a_good_one_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="s3://other"):
        plan(listing(tmp_path, *["s3://other/x.jpg"] * 32, "x.jpg"))
    assert plan(listing(tmp_path, *["s3://other/x.jpg"] * 31, "x.jpg"))


def test_a_parquet_that_begins_elsewhere_is_refused_with_the_flag(tmp_path: Path) -> None:
    for name, table in {
        "plain": pa.table({"url": ["s3://other/x.jpg"]}),
        "struct": pa.table({"image": [{"bytes": None, "path": "/etc/x.jpg"}]}),
    }.items():
        pq.write_table(table, tmp_path / f"{name}.parquet")
        with pytest.raises(InputError, match=r"read\.allow='\[\"(s3://other|/etc)\"\]'"):
            plan(tmp_path / f"{name}.parquet")
        assert plan(tmp_path / f"{name}.parquet", allow=["s3://other", "/etc"])
    bytes_first = pa.table({"image": [{"bytes": IMAGE, "path": "/etc/x.jpg"}]})
    pq.write_table(bytes_first, tmp_path / "bytes.parquet")
    assert [sample.image for sample in read(tmp_path / "bytes.parquet")] == [IMAGE]


@pytest.mark.parametrize("image", ["x\0.jpg", "zip://a::x.jpg", "https://nowhere.invalid/x.jpg", ""])
def test_a_manifest_that_begins_with_a_bad_row_is_planned(tmp_path: Path, image: str) -> None:
    assert plan(listing(tmp_path, image, "x.jpg"))


def test_the_slices_of_a_manifest_do_not_hang_on_what_is_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(secrets, "_known", set())
    monkeypatch.setattr(secrets, "_known_pattern", None)
    uri = put("a.jsonl", b'{"key": "a", "caption": "b"}', "planted-7f3a") + "?key=train"
    STORE.put_atomic(uri, b'{"key": "a", "caption": "b"}')
    secrets.remember({"s3": {"secret": "planted-7f3a"}})
    assert plan_shards([uri], "manifest", ReadConfig(), STORE, {})[1] == {uri: 1}


def test_the_slices_of_a_manifest_are_recorded_without_its_credentials() -> None:
    uri = put("a.jsonl", b'{"key": "a", "caption": "b"}')
    signed = f"{uri}?sig=planted"
    STORE.put_atomic(signed, b'{"key": "a", "caption": "b"}')
    _, slices = plan_shards([signed], "manifest", ReadConfig(), STORE, {})
    assert slices == {f"{uri}?sig=***": 1}
    assert plan_shards([signed], "manifest", ReadConfig(), STORE, {f"{uri}?sig=***": 4})[0][0].slice == (0, 4)
