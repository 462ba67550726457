"""What is taken down is found once, recorded without its key, and recognised when its shard is read again."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines import read, sources
from pipelines.config import ReadConfig, WriteConfig
from pipelines.contracts import Sample, Shard
from pipelines.ledger import Counts, Work, make_plan, read_commit, standing_commits, tally
from pipelines.remove import Asked, Removal, remove
from pipelines.remove import _with_lasting as with_lasting
from pipelines.sources import parquet
from pipelines.storage import Store
from pipelines.takedowns import TOMBSTONE, Marks, marks_of, read_requests, read_takedowns, record, requests
from pipelines.verify import problems
from pipelines.write import EmbeddingSink
from tests.encoded import ENCODER, FAMILIES, encoded_row, encoded_rows
from tests.unit.sources.made import plan

ROWS = 23
SHARDS = ["a-000000000000", "b-000000000000"]


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """Two shards with the same keys."""
    store = Store(str(tmp_path))
    for shard in SHARDS:
        write(store, shard)
    return store


def write(
    store: Store, shard: str = SHARDS[0], version: str = "v1", families: Any = FAMILIES, plan: Any = None
) -> None:
    EmbeddingSink(store, families, WriteConfig(rows_per_row_group=7), plan).write(
        [encoded_rows(range(ROWS), ROWS, shard, version)], None
    )


def take_down(store: Store, *keys: str, **more: Any) -> Removal:
    return remove(store, Asked(list(keys)), "tester@here", "a notice", **more)


def rows_of(store: Store, dataset: str, shard: str = SHARDS[0]) -> list[int]:
    return [
        row
        for name in sorted(store.names(dataset))
        if shard in name
        for row in pq.read_table(f"{store.root}/{dataset}/{name}")["row"].to_pylist()
    ]


def test_every_sample_of_a_key_is_found_and_what_is_in_none_is_told(store: Store) -> None:
    removal = take_down(store, "00003", "00019", "nowhere")
    assert [(found.ref.shard, found.rows["row"].to_pylist()) for found in removal.found] == [
        (shard, [3, 19]) for shard in SHARDS
    ]
    assert removal.missing == ["nowhere"] and removal.samples == 4
    known = read_takedowns(store)
    assert known.samples() == 4 and known.rows_of(SHARDS[0], "v1").tolist() == [3, 19]
    (request,) = read_requests(store)
    assert (request.by, request.reason, request.samples) == ("tester@here", "a notice", 4) == (
        removal.request.by, removal.request.reason, removal.request.samples,
    )  # fmt: skip


def test_asking_again_records_nothing(store: Store) -> None:
    take_down(store, "00003")
    again = take_down(store, "00003")
    assert (again.samples, again.before, again.missing, again.request) == (0, 2, [], None)
    assert len(requests(store)) == 1
    assert take_down(store, "00003", "00004").samples == 2


def test_a_dry_run_leaves_no_trace(store: Store) -> None:
    before = {*store.names("")}
    assert take_down(store, "00003", dry_run=True).samples == 2
    assert {*store.names("")} == before


def test_a_tombstone_tells_no_key_caption_or_hash(store: Store) -> None:
    digest = hashlib.sha256(b"image").hexdigest()
    marks = Marks(b"0" * 32)
    assert len({marks.key(digest), marks.content(digest, None), marks.content(None, [digest])}) == 3
    take_down(store, "00003", "00005")
    for name in store.names("removed"):
        data = store.read(f"removed/{name}")
        assert b"00003" not in data and b"caption" not in data
        if name.endswith(".parquet"):
            table = pq.read_table(pa.py_buffer(data))
            assert table.column_names == ["shard", "version", "row", "key", "key_lasts", "content"]
            assert all(b"0000" not in mark for mark in table["key"].to_pylist())


def test_samples_are_found_by_their_image_under_whatever_key(tmp_path: Path) -> None:
    store, rows = Store(str(tmp_path)), encoded_rows(range(ROWS), ROWS)
    digests = [hashlib.sha256(bytes([row % 10])).hexdigest() for row in range(ROWS)]
    rows = rows.set_column(rows.schema.get_field_index("sha256"), "sha256", pa.array([*digests, None], pa.string()))
    EmbeddingSink(store, FAMILIES, WriteConfig()).write([rows], None)
    removal = remove(store, Asked(sha256=[digests[2]]), "", "")
    assert [found.rows["row"].to_pylist() for found in removal.found] == [[2, 12, 22]]


# -- read again ----------------------------------------------------------------------------------


def samples(changed: bool = False) -> list[Sample]:
    """0: image and caption; 1: caption alone; 2: an image. changed: the rows have shifted, key and image of two too."""
    found = [
        Sample("zero", b"image 0", True, ["a caption", None]),
        Sample("one", captions=["another caption"]),
        Sample("two", b"image 2", True),
    ]
    if changed:
        return [
            Sample("new", b"new", True),
            Sample("zero", b"recompressed", True),
            found[1],
            Sample("2", b"image 2", True),
        ]
    return found


def read_shard(
    store: Store, found: list[Sample], shard: str, version: str, monkeypatch: pytest.MonkeyPatch
) -> pa.Table:
    """As a run reads it whose input has no other shard."""

    def give(*_: object) -> Iterator[Sample]:
        yield from found

    monkeypatch.setattr(sources, "samples", give)
    work = Work(Shard(shard, "s3://b/a.tar", "tar", version, 1), tuple(FAMILIES))
    superseded = read_takedowns(store).superseded([work.shard])
    (task,) = read.ShardSource([work], ReadConfig(), Store(), output=store, superseded=superseded).get_read_tasks(1)
    return pa.concat_tables(task())


@pytest.fixture
def taken_down(tmp_path: Path) -> Store:
    """All three of `samples` have been removed from a shard, which holds a fourth."""
    store = Store(str(tmp_path))
    kept = Sample("kept", b"image 3", True, ["a caption", None])
    rows = [
        {
            **encoded_row(row, SHARDS[0]),
            "key": sample.key,
            "captions": sample.captions,
            "has_image": sample.has_image,
            "sha256": hashlib.sha256(sample.image).hexdigest() if sample.image else None,
            "image_vector": None,
            "text_vectors": [],
            "rejects": [],
            "families": ["samples"],
        }
        for row, sample in enumerate([*samples(), kept])
    ]  # fmt: skip
    end = {**rows[0], "row": 4, "end": True, "key": None, "captions": [], "has_image": False}
    EmbeddingSink(store, FAMILIES, WriteConfig()).write(
        [pa.Table.from_pylist([*rows, end], encoded_rows(range(1)).schema)], None
    )
    assert take_down(store, "zero", "one", "two").samples == 3
    return store


def gone(table: pa.Table) -> list[int]:
    return [row["row"] for row in table.to_pylist() if row["key"] is None and not row["end"]]


def test_of_a_removed_sample_only_that_it_was_there_is_read(taken_down: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    table = read_shard(taken_down, samples(), SHARDS[0], "v1", monkeypatch)
    assert gone(table) == [0, 1, 2]
    zero, one, two, _ = table.to_pylist()
    assert (zero["has_image"], zero["captions"]) == (True, [None, None])
    assert (one["has_image"], one["captions"]) == (False, [None]) and two["captions"] == []
    assert all(
        row[name] is None for row in (zero, one, two) for name in ("image", "metadata", "label", "uri", "offset")
    )


def test_where_the_input_has_changed_a_sample_is_known_by_key_or_content(
    taken_down: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert gone(read_shard(taken_down, samples(changed=True), SHARDS[0], "v2", monkeypatch)) == [1, 2, 3]


def test_in_another_object_by_key_and_content_together(taken_down: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    elsewhere = [
        Sample("zero", b"image 0", True),
        Sample("zero", b"other", True),
        Sample("x", b"image 0", True),
        samples()[1],
    ]
    assert gone(read_shard(taken_down, elsewhere, "c-000000000000", "v1", monkeypatch)) == [0, 3]


def test_a_piece_of_an_object_that_is_cut_anew_is_of_the_same_object(
    taken_down: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert gone(read_shard(taken_down, samples(changed=True), f"{SHARDS[0]}-p00001", "v3", monkeypatch)) == [1, 2, 3]


def commit_samples(store: Store, shard: Shard) -> None:
    found = list(sources.samples(shard, ReadConfig(), Store()))
    rows = [
        {
            **encoded_row(row, shard.id, shard.version),
            "families": ["samples"],
            "key": sample.key,
            "captions": sample.captions,
            "sha256": hashlib.sha256(sample.image).hexdigest() if sample.image else None,
            "row_group": sample.row_group,
            "image_vector": None,
            "text_vectors": [],
        }
        for row, sample in enumerate(found)
    ]
    end = encoded_rows(range(0), len(found), shard.id, shard.version)
    body = pa.Table.from_pylist(rows, end.schema)
    families = {"samples": FAMILIES["samples"]}
    EmbeddingSink(store, families, WriteConfig()).write([body, only_samples(end)], None)


def gone_of(store: Store, shards: list[Shard], **settings: Any) -> dict[str, list[str]]:
    """Keys that each shard's reading counts as removed, as a run of an encoder that is new reads them."""
    work = [Work(shard, (ENCODER.name,)) for shard in shards]
    superseded = read_takedowns(store).superseded(shards)
    source = read.ShardSource(work, ReadConfig(**settings), Store(), output=store, superseded=superseded)
    gone_keys = {}
    for shard, task in zip(shards, source.get_read_tasks(1), strict=True):
        keys = [sample.key for sample in sources.samples(shard, ReadConfig(**settings), Store())]
        gone_keys[shard.id.rpartition("-")[2]] = [keys[row] for row in gone(pa.concat_tables(task()))]
    return gone_keys


def folder_of_placeholders(folder: Path) -> None:
    """40 images under their numbers, every fourth of them the same bytes."""
    folder.mkdir()
    for number in range(40):
        (folder / f"{number:03d}.jpg").write_bytes(b"placeholder" if number % 4 == 0 else b"image %d" % number)


def parquet_of_placeholders(file: Path) -> None:
    images = [b"placeholder" if number % 4 == 0 else b"image %d" % number for number in range(40)]
    table = pa.table({"key": [f"{number:03d}" for number in range(40)], "image": images})
    pq.write_table(table, file, row_group_size=10)


@pytest.mark.parametrize(("make", "name", "settings"), [
    (folder_of_placeholders, "images", {"samples_per_slice": 10}),
    (parquet_of_placeholders, "images.parquet", {"rows_per_shard": 10}),
])  # fmt: skip
def test_of_a_sibling_of_what_was_taken_down_nobody_asked_for_anything(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make: Any, name: str, settings: dict[str, int]
) -> None:
    """While its object has not changed, a sample of another piece needs key and content, as anywhere else."""
    monkeypatch.setattr(parquet, "CUT_ABOVE_BYTES", 0)
    make(tmp_path / name)
    shards = plan(tmp_path / name, **settings)
    assert len(shards) == 4
    store = Store(str(tmp_path / "output"))
    for shard in shards:
        commit_samples(store, shard)
    assert take_down(store, "024").samples == 1
    assert [key for keys in gone_of(store, shards, **settings).values() for key in keys] == ["024"]


def test_a_sample_that_moves_to_another_piece_when_the_file_changes_is_known_by_key_or_content(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parquet, "CUT_ABOVE_BYTES", 0)
    file, settings = tmp_path / "images.parquet", {"rows_per_shard": 10}
    keys, images = [f"{number:03d}" for number in range(40)], [b"image %d" % number for number in range(40)]
    pq.write_table(pa.table({"key": keys, "image": images}), file, row_group_size=10)
    store = Store(str(tmp_path / "output"))
    for shard in plan(file, **settings):
        commit_samples(store, shard)
    assert take_down(store, "008", "009").samples == 2
    shifted = {
        "key": ["a", "b", *keys[:9], "renamed", *keys[10:]],
        "image": [b"a", b"b", *images[:8], b"new", *images[9:]],
    }
    pq.write_table(pa.table(shifted), file, row_group_size=10)
    changed = plan(file, **settings)
    assert gone_of(store, changed, **settings) == {
        "p0000": [],
        "p0001": ["008", "renamed"],
        "p0002": [],
        "p0003": [],
        "p0004": [],
    }
    fragments = [only_samples(encoded_rows(range(2), 2, changed[1].id, changed[1].version))]
    fragments[0] = fragments[0].set_column(
        fragments[0].schema.get_field_index("key"), "key", pa.array(["008", "kept", None])
    )
    superseded = read_takedowns(store).superseded(changed)
    EmbeddingSink(store, {"samples": FAMILIES["samples"]}, WriteConfig(), superseded=superseded).write(fragments, None)
    (commit,) = (each for each in standing_commits(store, "samples") if each.version == changed[1].version)
    assert read_commit(store, commit).removed == 1, "of fragments that are older than the takedown too"


def test_a_key_that_is_but_a_number_does_not_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Row 3 of a Parquet file without keys goes; when a row is put before it, the row that was before it stays."""
    store = Store(str(tmp_path))
    digests = [hashlib.sha256(f"image {row}".encode()).hexdigest() for row in range(10)]
    rows = pa.Table.from_pylist(
        [
            {**row, "key": str(row["row"]), "row_group": 0, "sha256": digests[row["row"]], "image_vector": None, "text_vectors": []}
            for row in encoded_rows(range(10)).to_pylist()
        ],
        encoded_rows(range(1)).schema,
    )  # fmt: skip
    end = encoded_rows(range(0), 10)
    EmbeddingSink(store, {"samples": FAMILIES["samples"]}, WriteConfig()).write(
        [only_samples(rows), only_samples(end)], None
    )
    take_down(store, "3")
    shifted = [Sample(str(row), f"image {row - 1}".encode(), True, row_group=0) for row in range(11)]
    assert gone(read_shard(store, shifted, SHARDS[0], "v2", monkeypatch)) == [4]


def only_samples(rows: pa.Table) -> pa.Table:
    field = rows.schema.field("families")
    column = pa.array([["samples"]] * rows.num_rows, field.type)
    return rows.set_column(rows.schema.get_field_index("families"), field, column)


# -- written again -------------------------------------------------------------------------------


def test_removed_rows_are_counted_and_in_no_part(store: Store) -> None:
    """Fragments of a run that died are older than the takedown: it holds for them too."""
    take_down(store, "00003", "00004", "00008", "00014")
    counted = [encoded_row(row) for row in (3, 4, 8, 14)]
    write(store, version="v2", plan=make_plan(store, [Shard(SHARDS[0], "s3://b/a.tar", "tar", "v2", 1)], FAMILIES))
    (ref,) = (ref for ref in standing_commits(store, ENCODER.name) if ref.version == "v2")
    commit = read_commit(store, ref)
    assert commit.rows == ROWS and commit.removed == 4
    assert commit.counts["image"].removed == sum(row["has_image"] for row in counted)
    assert commit.counts["text"].removed == sum(len(row["captions"]) for row in counted)
    for dataset in (
        "samples",
        f"embeddings/{ENCODER.name}/image",
        f"embeddings/{ENCODER.name}/text",
        f"rejects/{ENCODER.name}",
    ):
        assert not {3, 4, 8, 14} & set(rows_of(store, dataset)) and rows_of(store, dataset)
    assert list(problems(store)) == []
    counts, _, _ = tally(store, [ENCODER.name])
    assert counts["image"] == read_commit(store, standing_commits(store, ENCODER.name)[1]).counts["image"].plus(
        commit.counts["image"]
    )
    assert isinstance(counts["image"], Counts)


def test_a_whole_shard_can_go(store: Store) -> None:
    take_down(store, *(f"{row:05d}" for row in range(ROWS)))
    write(store, version="v2", plan=make_plan(store, [Shard(SHARDS[0], "s3://b/a.tar", "tar", "v2", 1)], FAMILIES))
    assert rows_of(store, "samples") == [] == rows_of(store, f"embeddings/{ENCODER.name}/image")
    assert list(problems(store)) == []


@pytest.mark.parametrize("key", ["18446744073709551616", "12297829382473034410", "9" * 5000, "9223372036854775807"])
def test_a_key_beyond_what_rows_can_be_lasts(key: str) -> None:
    rows = {"row": [0, 1], "key": [key, "1"], "sha256": [None] * 2, "captions": [["a"]] * 2, "row_group": [0, 0]}
    assert with_lasting(pa.table(rows))["key_lasts"].to_pylist() == [True, True]


def test_a_shard_is_cut_at_the_same_rows_whatever_was_taken_down(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    def blocks() -> list[int]:
        found = [Sample(f"{row:05d}", bytes(600_000), True) for row in range(8)]
        monkeypatch.setattr(sources, "samples", lambda *_: iter(found))
        work = Work(Shard(SHARDS[0], "s3://b/a.tar", "tar", "v1", 1), tuple(FAMILIES))
        return [block.num_rows for block in read.read_shard(work, ReadConfig(block_mib=1), Store(), output=store)]

    before = blocks()
    take_down(store, "00000", "00003")
    assert blocks() == before and len(before) > 2


def test_an_image_that_was_compacted_away_counts_as_removed_before(store: Store) -> None:
    digest = hashlib.sha256(b"image").hexdigest()
    marks = marks_of(store)
    tombstone = {"shard": "x", "version": "v", "row": 0, "key": marks.key("x"), "key_lasts": True}
    record(store, pa.Table.from_pylist([{**tombstone, "content": marks.content(digest, None)}], TOMBSTONE), "", "")
    removal = remove(store, Asked(sha256=[digest, "0" * 64]), "", "")
    assert (removal.before, removal.missing) == (1, ["0" * 64])
