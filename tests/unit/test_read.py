"""A shard's samples become numbered rows in blocks that are cut alike every time, and end with a mark."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from pipelines.config import ReadConfig
from pipelines.contracts import SAMPLE
from pipelines.errors import ChangedInputError
from pipelines.ledger import Work
from pipelines.read import ShardSource, read_shard
from pipelines.sources import plan_shards
from pipelines.storage import Store
from tests.unit.sources.made import jpeg, tar_of

STORE = Store()


def work_of(path: Path, members: list[tuple[str, bytes]]) -> Work:
    path.write_bytes(tar_of(members))
    (shard,), _ = plan_shards([str(path)], "auto", ReadConfig(), STORE, {})
    return Work(shard, ("samples", "clip"))


def pairs(count: int, padding: int = 0) -> list[tuple[str, bytes]]:
    """Captioned images. Padding makes an image larger, and a decoder does not mind."""
    return [
        member
        for key in range(count)
        for member in ((f"{key:03d}.jpg", jpeg(key) + b"\x00" * padding), (f"{key:03d}.txt", f"caption {key}".encode()))
    ]


def blocks(work: Work, **settings: Any) -> list[pa.Table]:
    return list(read_shard(work, ReadConfig(**settings), STORE))


def test_rows_are_numbered_and_the_last_is_the_end_mark(tmp_path: Path) -> None:
    work = work_of(tmp_path / "a.tar", pairs(10))
    rows = pa.concat_tables(blocks(work)).to_pylist()
    assert [row["row"] for row in rows] == [*range(10), 10]
    assert [row["end"] for row in rows] == [False] * 10 + [True]
    assert [row["captions"] for row in rows] == [[f"caption {key}"] for key in range(10)] + [[]]
    assert [row["image"] for row in rows] == [jpeg(key) for key in range(10)] + [None]
    assert {(row["shard"], row["shard_uri"], row["version"]) for row in rows} == {
        (work.shard.id, str(tmp_path / "a.tar"), work.shard.version)
    }
    assert all(row["families"] == ["samples", "clip"] for row in rows)
    assert rows[-1]["has_image"] is False and rows[-1]["rejects"] == []


def test_blocks_are_cut_by_rows(tmp_path: Path) -> None:
    cut = blocks(work_of(tmp_path / "a.tar", pairs(10)), rows_per_block=4)
    assert [block.num_rows for block in cut] == [4, 4, 3]
    assert all(block.schema.equals(SAMPLE) for block in cut)


def test_blocks_are_cut_by_bytes(tmp_path: Path) -> None:
    cut = blocks(work_of(tmp_path / "a.tar", pairs(5, padding=600_000)), block_mib=1)
    assert [block.num_rows for block in cut] == [2, 2, 2]


def test_captions_and_metadata_count_as_bytes_of_a_block(tmp_path: Path) -> None:
    described = [(f"{key}.json", json.dumps({"note": "é" * 300_000}).encode()) for key in range(5)]
    cut = blocks(work_of(tmp_path / "a.tar", described), block_mib=1)
    assert [block.num_rows for block in cut] == [2, 2, 2]
    captioned = [(f"{key}.txt", b"x" * 600_000) for key in range(5)]
    cut = blocks(work_of(tmp_path / "b.tar", captioned), block_mib=1)
    assert [block.num_rows for block in cut] == [2, 2, 2]


def test_a_shard_that_fills_its_blocks_still_ends_with_a_mark(tmp_path: Path) -> None:
    cut = blocks(work_of(tmp_path / "a.tar", pairs(8)), rows_per_block=4)
    assert [block.num_rows for block in cut] == [4, 4, 1]
    assert cut[-1].to_pylist()[0]["row"] == 8


def test_a_second_reading_is_cut_alike(tmp_path: Path) -> None:
    work = work_of(tmp_path / "a.tar", pairs(20, padding=100_000))
    first, second = (blocks(work, rows_per_block=7, block_mib=1) for _ in range(2))
    assert len(first) == len(second) > 2
    assert all(one.equals(other) for one, other in zip(first, second, strict=True))


def test_an_empty_shard_is_an_end_mark_alone(tmp_path: Path) -> None:
    (block,) = blocks(work_of(tmp_path / "a.tar", []))
    (row,) = block.to_pylist()
    assert row["end"] is True and row["row"] == 0


def test_metadata_is_json_that_keeps_everything(tmp_path: Path) -> None:
    told = {"url": "http://h/é.jpg", "size": 3, "nested": {"list": [1, None]}, "日本": "語", "half": 0.5}
    work = work_of(tmp_path / "a.tar", [("a.jpg", jpeg()), ("a.json", json.dumps(told).encode())])
    metadata = blocks(work)[0].to_pylist()[0]["metadata"]
    assert json.loads(metadata) == told
    assert "日本" in metadata


def test_a_reject_travels_in_its_row(tmp_path: Path) -> None:
    work = work_of(tmp_path / "a.tar", [("a.jpg", jpeg()), ("a.txt", b"\xff\xfe\xfa broken"), ("b.jpg", jpeg())])
    first, second, _ = blocks(work)[0].to_pylist()
    (reject,) = first["rejects"]
    assert (reject["modality"], reject["caption_index"], reject["stage"]) == ("text", 0, "read")
    assert first["captions"] == [None] and second["rejects"] == []


def test_a_shard_that_changed_since_the_plan_is_told(tmp_path: Path) -> None:
    work = work_of(tmp_path / "a.tar", pairs(3))
    (tmp_path / "a.tar").write_bytes(tar_of(pairs(4)))
    with pytest.raises(ChangedInputError, match=r"a\.tar has changed since the run was planned"):
        blocks(work)


def test_what_was_read_is_observed_once(tmp_path: Path) -> None:
    work, seen = work_of(tmp_path / "a.tar", pairs(10)), list[dict[str, Any]]()
    list(read_shard(work, ReadConfig(rows_per_block=3), STORE, lambda **numbers: seen.append(numbers)))
    (told,) = seen
    assert (told["stage"], told["rows"], told["shards"], told["bytes"]) == ("read", 10, 1, work.shard.bytes)
    assert told["seconds"] > 0


def test_each_pending_shard_is_one_read_task_whatever_the_parallelism(tmp_path: Path) -> None:
    pending = [work_of(tmp_path / f"{name}.tar", pairs(3)) for name in "abc"]
    source = ShardSource(pending, ReadConfig(), STORE)
    for parallelism in (1, 3, 200):
        tasks = source.get_read_tasks(parallelism)
        assert len(tasks) == 3
    read = [pa.concat_tables(task()) for task in tasks]
    assert [table["shard"][0].as_py() for table in read] == [work.shard.id for work in pending]
    assert source.estimate_inmemory_data_size() == sum(work.shard.bytes for work in pending)
    assert ShardSource([], ReadConfig(), STORE).get_read_tasks(4) == []
