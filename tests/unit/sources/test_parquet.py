import base64
import dataclasses
import datetime
import io
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines.config import ReadConfig
from pipelines.contracts import Sample
from pipelines.errors import AccessError, ChangedInputError, InputError, StorageError
from pipelines.sources import parquet, plan_shards, samples
from pipelines.storage import Store
from tests.unit.sources.made import STORE, check, jpeg, plan, put, read, reasons

IMAGES = [jpeg(seed) for seed in range(6)]


def file_of(table: pa.Table | dict[str, Any], **options: Any) -> bytes:
    file = io.BytesIO()
    pq.write_table(table if isinstance(table, pa.Table) else pa.table(table), file, **options)
    return file.getvalue()


def read_parquet(table: pa.Table | dict[str, Any], folder: str = "", **settings: Any) -> list[Sample]:
    return read(put("a.parquet", file_of(table), folder), **settings)


def test_image_bytes_captions_key_and_all_other_columns() -> None:
    table = pa.table(
        {
            "jpg": pa.array([*IMAGES[:2], None], pa.binary()),
            "caption": ["one", None, "three"],
            "key": ["a", "b", None],
            "label": [4, 5, 6],
            "when": [datetime.datetime(2024, 1, 2), None, None],
            "score": [0.5, float("nan"), 1.0],
            "tags": [["x", "y"], [], None],
            "blob": [b"\xff", b"", None],
        }
    )
    first, second, third = read_parquet(table)
    assert [sample.image for sample in (first, second, third)] == [*IMAGES[:2], None]
    assert [sample.captions for sample in (first, second, third)] == [["one"], [], ["three"]]
    assert [sample.key for sample in (first, second, third)] == ["a", "b", "2"]
    assert first.metadata == {
        "label": 4, "when": "2024-01-02 00:00:00", "score": 0.5, "tags": ["x", "y"],
        "blob": "/w==", "_base64": ["blob"],
    }  # fmt: skip
    assert (first.label, first.row_group, first.offset, second.metadata["score"]) == ("4", 0, None, None)
    assert not third.has_image
    json.dumps([sample.metadata for sample in (first, second, third)], allow_nan=False)


def test_hugging_faces_struct_and_lists_of_captions() -> None:
    image = pa.array(
        [{"bytes": IMAGES[0], "path": "x.jpg"}, {"bytes": None, "path": "there.jpg"}, {"bytes": None, "path": None}],
        pa.struct([("bytes", pa.binary()), ("path", pa.string())]),
    )
    uri = put("there.jpg", IMAGES[1])
    table = {"image": image, "sentences": [["a", "b"], [], ["c"]]}
    found = read_parquet(pa.table(table), uri.split("/")[3])
    assert [sample.image for sample in found] == [IMAGES[0], IMAGES[1], None]
    assert [sample.captions for sample in found] == [["a", "b"], [], ["c"]]
    assert (found[1].uri, found[1].length) == (uri, len(IMAGES[1]))
    assert not any(sample.rejects for sample in found)


def test_paths_and_urls_are_fetched_in_order_or_rejected() -> None:
    there = put("x/there.jpg", IMAGES[1])
    folder = there.split("/")[3]
    references = [
        "x/there.jpg",
        there,
        "missing.jpg",
        "/etc/hostname",
        "file:///etc/hostname",
        "zip://a::file:///etc/hostname",
        "ftp://host/x.jpg",
        "",
        None,
    ]
    found = read_parquet({"url": references * 5, "text": ["t"] * 45}, folder)
    assert [reasons(sample) for sample in found[:9]] == [
        [], [], ["not_found"], *[["forbidden_url"]] * 4, [], [],
    ]  # fmt: skip
    assert [sample.image for sample in found] == [IMAGES[1], IMAGES[1], *[None] * 7] * 5
    assert not found[-1].has_image


def test_local_listings_may_name_local_files(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(IMAGES[0])
    pq.write_table(
        pa.table({"path": ["a.jpg", f"{tmp_path}/a.jpg", f"file://{tmp_path}/a.jpg"]}), tmp_path / "t.parquet"
    )
    assert [sample.image for sample in read(tmp_path / "t.parquet")] == [IMAGES[0]] * 3


def test_odd_values_are_rejects_not_exceptions() -> None:
    table = pa.table(
        {
            "image": pa.array([1, 2], pa.int64()),
            "caption": pa.array([b"caf\xe9", b"fine"]).view(pa.string()),
            "when": pa.array([2**62, 1], pa.timestamp("s")),
            "names": pa.array([[b"\xff"], [b"ok"]], pa.list_(pa.binary())).cast(pa.list_(pa.binary())),
        }
    )
    first, second = read_parquet(table)
    assert reasons(first) == ["not_utf8", "not_an_image"]
    assert (second.captions, reasons(second)) == (["fine"], ["not_an_image"])
    (large,) = read_parquet({"image": [b"x" * 2000], "caption": ["c" * 2000]}, max_image_bytes=99, max_caption_bytes=99)
    assert reasons(large) == ["caption_too_large", "image_too_large"]


def test_a_time_zone_that_nobody_knows_costs_its_column_alone() -> None:
    """Found by fuzzing: pytz raises a KeyError."""
    times = pa.array([0], pa.timestamp("us", "Nowhere/City"))
    (sample,) = read_parquet(pa.table({"caption": ["a dog"], "when": times, "n": [1]}))
    assert (sample.captions, sample.rejects, sample.metadata["n"]) == (["a dog"], [], 1)


def test_columns_of_bytes_are_kept_as_text_or_base64_and_large_ones_are_told() -> None:
    noise = bytes(range(256))
    table = {
        "caption": ["a", "b"],
        "label": [b"cat", "Käfer".encode()],
        "text": [b"t" * 10_000, None],
        "hash": pa.array([noise[200:216], noise[150:166]], pa.binary(16)),
        "blob": [noise * 16, noise * 16 + b"."],
        "mask": [noise * 300, noise * 301],
        "two": pa.array([{"bytes": noise * 20, "path": "x"}, {"bytes": b"\xff", "path": "y"}]),
    }
    first, second = (sample.metadata for sample in read_parquet(table))
    assert (first["label"], second["label"], first["text"]) == ("cat", "Käfer", "t" * 10_000)
    assert [base64.b64decode(row["hash"]) for row in (first, second)] == [noise[200:216], noise[150:166]]
    assert base64.b64decode(first["blob"]) == noise * 16
    assert (first["two"], second["two"]) == ({"bytes": None, "path": "x"}, {"bytes": "/w==", "path": "y"})
    assert "mask" not in first
    assert (sorted(first["_base64"]), sorted(first["_skipped"])) == (["blob", "hash"], ["mask", "two"])
    assert (sorted(second["_base64"]), sorted(second["_skipped"])) == (["hash", "two"], ["blob", "mask"])


def test_a_field_that_is_nested_too_deeply_is_left_out_with_a_reason() -> None:
    deep: Any = "x"
    for _ in range(80):
        deep = [deep]
    (sample,) = read_parquet(pa.table({"caption": ["c"], "deep": pa.array([deep]), "n": [1]}))
    assert sample.captions == ["c"]
    assert sample.metadata == {"n": 1, "_error": ["deep: nested too deeply"], "_skipped": ["deep"]}


def test_columns_can_be_named_and_unknown_ones_are_refused() -> None:
    table = {"first": ["a"], "second": ["b"], "mine": ["k"]}
    (sample,) = read_parquet(table, caption_column="second", key_column="mine")
    assert (sample.captions, sample.key, sample.metadata) == (["b"], "k", {"first": "a"})
    with pytest.raises(InputError, match="it has: first, second, mine"):
        read_parquet(table)
    with pytest.raises(InputError, match="has no column nope"):
        read_parquet(table, caption_column="nope")


def test_no_image_column_where_the_setting_is_empty() -> None:
    (sample,) = read_parquet({"url": ["http://nowhere.invalid/x.jpg"], "text": ["t"]}, image_column="")
    assert (sample.has_image, sample.captions) == (False, ["t"])
    assert sample.metadata == {"url": "http://nowhere.invalid/x.jpg"}


def test_large_files_are_cut_at_row_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parquet, "CUT_ABOVE_BYTES", 0)
    table = pa.table({"image": IMAGES * 10, "caption": [str(i) for i in range(60)]})
    uri = put("a.parquet", file_of(table, row_group_size=7))
    shards = plan(uri, rows_per_shard=20)
    assert [shard.row_groups for shard in shards] == [(0, 2), (2, 4), (4, 6), (6, 9)]
    assert [shard.id.rpartition("-")[2] for shard in shards] == [f"p{i:04d}" for i in range(4)]
    stored = STORE.stat(uri).bytes
    assert [shard.bytes for shard in shards] == [stored * rows // 60 for rows in (14, 14, 14, 18)]
    found = read(uri, rows_per_shard=20)
    assert [sample.captions for sample in found] == [[str(i)] for i in range(60)]
    assert [sample.key for sample in found] == [str(i) for i in range(60)]
    assert [sample.row_group for sample in found] == [i // 7 for i in range(60)]
    assert not {s.version for s in shards} & {s.version for s in plan(uri, rows_per_shard=30)}
    assert [shard.row_groups for shard in plan(uri, rows_per_shard=100)] == [None]


@pytest.mark.parametrize(
    ("rows", "expected"),
    [([], []), ([5], [(0, 1)]), ([50, 50], [(0, 1), (1, 2)]), ([4, 4, 4], [(0, 2), (2, 3)]), ([0, 0], [(0, 2)])],
)
def test_cut(rows: list[int], expected: list[tuple[int, int]]) -> None:
    assert parquet.cut(rows, 10) == expected


def test_a_torn_file_is_one_reject() -> None:
    data = file_of({"image": IMAGES, "caption": ["c"] * 6})
    folder = put("good.parquet", data).rpartition("/")[0]
    put("torn.parquet", data[:-40], folder.split("/")[3])
    put("empty.parquet", b"", folder.split("/")[3])
    found = read(folder)
    assert sorted(map(tuple, map(reasons, found))) == [(), (), (), (), (), (), ("corrupt_shard",), ("corrupt_shard",)]


def test_a_file_of_other_columns_among_good_ones_is_one_reject() -> None:
    folder = put("a.parquet", file_of({"image": IMAGES})).rpartition("/")[0]
    put("b.parquet", file_of({"n": [1]}), folder.split("/")[3])
    found = read(folder)
    assert len(found) == 7
    assert reasons(found[-1]) == ["wrong_columns"]


def test_a_file_of_other_columns_before_good_ones_is_one_reject() -> None:
    folder = put("a.parquet", file_of({"n": [1]})).rpartition("/")[0]
    put("b.parquet", b"torn", folder.split("/")[3])
    put("c.parquet", file_of({"image": IMAGES}), folder.split("/")[3])
    assert [reasons(sample) for sample in read(folder)] == [["wrong_columns"], ["corrupt_shard"], *[[]] * 6]


def test_rows_that_the_footer_has_and_the_file_has_not_are_rejects(monkeypatch: pytest.MonkeyPatch) -> None:
    """One each, but one for all where the number itself is of the broken footer's making."""
    whole = file_of({"image": IMAGES}, use_dictionary=False)
    uri = put("a.parquet", whole)
    monkeypatch.setattr(parquet, "_readable", lambda *_: iter([{"image": IMAGES[0]}]))
    assert [reasons(sample) for sample in read(uri)] == [[], *[["corrupt_row_group"]] * 5]
    monkeypatch.setattr(parquet, "_MANY_ROWS", 4)
    (shard,) = plan(uri)
    few = dataclasses.replace(shard, bytes=4)
    lost = list(parquet.samples(few, ReadConfig(), STORE))
    assert [reasons(sample) for sample in lost] == [[], ["corrupt_row_group"]]
    assert lost[-1].rejects[0].detail.startswith("5 rows: ")


def test_rows_of_a_damaged_row_group_are_rejects_one_each() -> None:
    data = bytearray(file_of({"image": IMAGES * 10}, row_group_size=20, compression="zstd", use_dictionary=False))
    start = pq.ParquetFile(io.BytesIO(data)).metadata.row_group(1).column(0).data_page_offset
    data[start : start + 60] = b"\xff" * 60
    found = read(put("a.parquet", bytes(data)))
    assert [bool(sample.rejects) for sample in found] == [False] * 20 + [True] * 20 + [False] * 20
    assert {reason for sample in found[20:40] for reason in reasons(sample)} == {"corrupt_row_group"}
    assert [sample.key for sample in found] == [str(i) for i in range(60)]


@dataclass(frozen=True)
class FailingStore(Store):
    """A store that fails on the first bytes of an object: rows, not the footer."""

    error: Exception = field(default_factory=lambda: StorageError("the network is gone"))
    first_bytes: int = 200

    def open(self, path: str, listed: bool = False) -> io.BufferedReader:
        error, first_bytes = self.error, self.first_bytes

        class Failing(io.BytesIO):
            def read(self, size: int | None = -1) -> bytes:
                if self.tell() < first_bytes:
                    raise error
                return super().read(size)

        return Failing(super().open(path).read())  # type: ignore[return-value]


FAILURES = [StorageError("the network is gone"), AccessError("403"), FileNotFoundError("gone")]


@pytest.mark.parametrize("error", FAILURES, ids=repr)
@pytest.mark.parametrize("first_bytes", [200, 10**9], ids=["rows", "footer"])
def test_a_failing_store_is_no_torn_file(error: Exception, first_bytes: int) -> None:
    (shard,) = plan(put("a.parquet", file_of({"image": IMAGES})))
    store = FailingStore(error=error, first_bytes=first_bytes)
    expected = ChangedInputError if isinstance(error, FileNotFoundError) else type(error)
    with pytest.raises(expected):
        for sample in samples(shard, ReadConfig(), store):
            check(sample)


@pytest.mark.parametrize("error", FAILURES, ids=repr)
@pytest.mark.parametrize("footer_of", ["first", "large"])
def test_a_footer_that_cannot_be_read_is_no_plan(
    error: Exception, footer_of: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    uri = put("a.parquet", file_of({"image": IMAGES}))
    if footer_of == "large":
        monkeypatch.setattr(parquet, "CUT_ABOVE_BYTES", 0)
        monkeypatch.setattr(parquet, "_require_columns", lambda *_: None)
    expected = StorageError if type(error) is StorageError else InputError
    with pytest.raises(expected):
        plan_shards([uri], "auto", ReadConfig(), FailingStore(error=error, first_bytes=10**9), {})


def test_pieces_are_read_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parquet, "CUT_ABOVE_BYTES", 0)
    uri = put("a.parquet", file_of({"caption": [str(i) for i in range(30)]}, row_group_size=10))
    last = plan(uri, rows_per_shard=10)[-1]
    assert [sample.captions for sample in samples(last, ReadConfig(), STORE)] == [[str(i)] for i in range(20, 30)]
