"""What `--where` lets through is what DuckDB's WHERE does of the same Parquet files."""

import json
from pathlib import Path

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines.contracts import SAMPLES_PART
from pipelines.errors import ConfigError
from pipelines.index import filter as module
from pipelines.index.filter import select
from pipelines.index.parts import Parts, embeddings_folder, list_parts
from pipelines.index.selection import Selection
from pipelines.index.where import parse
from pipelines.storage import Store
from tests.indexed import ENCODER, everything, part_name, write_output


def describe(root: Path) -> None:
    """Gives the samples labels, sizes and metadata, with nulls among them."""
    for path in sorted((root / "samples").glob("*.parquet")):
        table = pq.read_table(path)
        rows = table["row"].to_pylist()
        random = np.random.default_rng(len(rows))
        told = {
            "label": [(None, "cat", "dog", "o'clock")[row % 4] for row in rows],
            "width": [None if row % 13 == 0 else 100 + row for row in rows],
            "height": random.integers(1, 300, len(rows)).tolist(),
            "metadata": [
                None
                if row % 5 == 0
                else json.dumps(
                    {"license": ("CC0", "BY", None)[row % 3], "deep": {"score": row / 7, "ok": row % 2 == 0}}
                )
                for row in rows
            ],
        }
        for name, values in told.items():
            at = table.schema.get_field_index(name)
            table = table.set_column(at, SAMPLES_PART.field(name), pa.array(values, SAMPLES_PART.field(name).type))
        pq.write_table(table, path, row_group_size=64)


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("described")
    write_output(root, parts=3, rows=200)
    describe(root)
    return root


def parts_of(root: Path, modality: str) -> Parts:
    return list_parts(Store(str(root)), embeddings_folder(ENCODER, modality))


LICENSE, SCORE, OK = "metadata->>'$.license'", "(metadata->>'$.deep.score')::double", "(metadata->>'$.deep.ok')::bool"
SAME = [
    ("label = 'cat' and width > 256", None),
    ("label = 'cat' or width > 256 and height <= 100", None),
    ("(label = 'cat' or width > 256) and height <= 100", None),
    ("not (label = 'cat' and width > 200)", None),
    ("not label = 'cat'", None),
    ("label != 'cat'", "label <> 'cat'"),
    ("label is null", None),
    ("LABEL IS NOT NULL AND NOT width < 150.5", None),
    ("label in ('cat', 'o''clock')", None),
    ("label not in ('cat', 'dog')", None),
    ('label = "o\'clock"', "label = 'o''clock'"),
    ("width in (101, 102, 290)", None),
    ("width >= 1e2 and width <> 150", None),
    ("key like '00001/%7'", None),
    ("key not like '%_7' and label like 'c%t'", None),
    ("key contains '/00001'", "contains(key, '/00001')"),
    ("key starts with '00002' and key not ends with '5'", "key[:5] = '00002' and key[-1:] <> '5'"),
    ("metadata.license = 'CC0'", f"{LICENSE} = 'CC0'"),
    ("metadata.license is null", f"{LICENSE} is null"),
    ("not metadata.license in ('CC0', 'X')", f"{LICENSE} not in ('CC0', 'X')"),
    ("metadata.deep.score > 12.5 and metadata.deep.ok = true", f"{SCORE} > 12.5 and {OK}"),
    ("metadata.'deep'.score < 3 or metadata.license starts with 'B'", f"{SCORE} < 3 or {LICENSE} like 'B%'"),
    ("metadata.license = 3", "false"),
    ("metadata is not null and row < 20", None),
    ("captions >= 2", "len(captions) >= 2"),
    ("caption contains '1/3'", "contains(captions[coalesce(caption_index, 0) + 1], '1/3')"),
    ("caption is null", "captions[coalesce(caption_index, 0) + 1] is null"),
    ("width > 100000", None),
]


@pytest.mark.parametrize("modality", ["image", "text"])
@pytest.mark.parametrize(("where", "sql"), SAME, ids=[where for where, _ in SAME])
def test_what_is_let_through_is_what_duckdb_finds(
    output: Path, modality: str, where: str, sql: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "BATCH_ROWS", 37)
    parts = parts_of(output, modality)
    chosen = select(Store(str(output)), parts, parse(where))
    index = "caption_index" if modality == "text" else "null"
    found = duckdb.sql(
        f"select e.shard, e.row, e.caption_index from '{output}/samples/*.parquet' s join "
        f"(select shard, row, {index} as caption_index from '{output}/embeddings/{ENCODER}/{modality}/*.parquet') e "
        f"using (shard, row) where {sql or where}"
    ).fetchall()
    items, _ = everything(output, modality)
    mine = [items[id] for id in chosen.mask(0, parts.rows).nonzero()[0]]
    assert sorted((item.shard, item.row, item.caption_index) for item in mine) == sorted(found)
    assert chosen.total == len(found)


def test_denied_parts_are_not_read_and_stay_denied(output: Path) -> None:
    parts = parts_of(output, "image")
    second = parts.ranges[1]
    denied = Selection.every(parts.rows).without_ranges([(second.offset, second.offset + second.rows)])
    renamed = parts.model_copy(
        update={
            "ranges": tuple(
                part if part != second else part.model_copy(update={"name": "gone"}) for part in parts.ranges
            )
        }
    )
    chosen = select(Store(str(output)), renamed, parse("width > 0"), denied)
    every = select(Store(str(output)), parts, parse("width > 0"))
    assert chosen.total == (every & denied).total > 0


def test_a_part_whose_samples_are_gone_has_nothing_to_find(tmp_path: Path) -> None:
    store = write_output(tmp_path, parts=2)
    parts = parts_of(tmp_path, "image")
    (tmp_path / "samples" / part_name(0)).unlink()
    assert select(store, parts, parse("row >= 0")).total == parts.ranges[1].rows


@pytest.mark.parametrize(
    ("where", "told", "mark"),
    [
        ("hight > 3", "hight is not a column", "^^^^^"),
        ("width > 3 and lable = 'a'", "lable is not a column", "              ^^^^^"),
        ("label = cat", "where a value is expected", "        ^^^"),
        ("width = 'a'", "is not a number, which width is", "        ^^^"),
        ("label > 3", "is not a text, which label is", "        ^"),
        ("label = 'cat", "is not closed", "        ^"),
        ("label = 'cat' width", "where and, or, or the end is expected", "              ^^^^^"),
        ("(label = 'cat'", r"the end: where \) is expected", "              ^"),
        ("label", "the end: where =, !=", "     ^"),
        ("", "the end: where a column is expected", "^"),
        ("width like '3'", "width is not a text", "^^^^^"),
        ("label starts 'c'", "where with is expected", "             ^^^"),
        ("key.x = 1", "where a key of metadata", "    ^"),
        ("metadata.x in (1, 'a')", "several kinds", "^^^^^^^^"),
        ("width > 3 ; drop", "is not understood", "          ^"),
        ("__import__('os')", "is not a column", "^^^^^^^^^^"),
    ],
)
def test_a_mistake_is_pointed_at(where: str, told: str, mark: str) -> None:
    with pytest.raises(ConfigError, match=told) as raised:
        parse(where)
    assert raised.value.what.splitlines()[1:] == [f"    {where}", f"    {mark}"]


def test_the_columns_are_listed() -> None:
    with pytest.raises(ConfigError) as raised:
        parse("nope = 1")
    assert all(name in raised.value.fix for name in ["caption (of an image, its first)", *SAMPLES_PART.names])


@pytest.mark.parametrize(
    ("where", "ids", "found"),
    [
        ("metadata.id > 5", [1234567890123456789, 1, None], [True, False, False]),
        ("metadata.id = 1234567890123456789", [1234567890123456789, 1234567890123456788, 5], [True, False, False]),
        ("metadata.id in (9007199254740993, 7)", [9007199254740992, 9007199254740993, 7], [False, True, True]),
        ("metadata.id = 5", [10**400, 5, 2**63], [False, True, False]),
        ("metadata.id > 5", [10**400, 5.5, 2**63], [False, True, True]),
        ("metadata.id > 5.5", [2**53 + 1, 5, 6], [True, False, True]),
        ("metadata.id in (1, 2.5)", [1, 2.5, 3], [True, True, False]),
        ("width in (100, 2.5)", [0, 0, 0], [True, False, False]),
        ("width in (100, 3000000000)", [0, 0, 0], [True, False, False]),
        ("width < 3000000000", [0, 0, 0], [True, True, True]),
        ("width < 1e400 and offset < 9223372036854775807", [0, 0, 0], [True, True, True]),
        (" or ".join(f"width = {at}" for at in range(99, 1300)), [0, 0, 0], [True, True, True]),
        (" and ".join(["width > 100"] * 1200), [0, 0, 0], [False, True, True]),
    ],
    ids=range(13),
)
def test_numbers_of_any_size_are_compared(where: str, ids: list[object], found: list[bool]) -> None:
    told = {
        "metadata": [json.dumps({"id": id}) for id in ids],
        "width": [100, 200, 300],
        "offset": [1, 2, 3],
    }
    columns = {
        field.name: pa.array(told[field.name], field.type) if field.name in told else pa.nulls(3, field.type)
        for field in SAMPLES_PART
    }
    samples = pa.table(columns, schema=SAMPLES_PART)
    assert module._answers(parse(where), samples, np.zeros(3, np.int64)).tolist() == found


@pytest.mark.parametrize(
    ("where", "told"),
    [
        ("width < 99999999999999999999", "more than an integer of 64 bits"),
        ("width in (100, -9223372036854775809)", "more than an integer of 64 bits"),
        ("width < " + "9" * 5000, "more than an integer of 64 bits"),
        ("key = '\udcff'", "not Unicode"),
        ("(" * 3000 + "key = 'a'" + ")" * 3000, "nested more than"),
        ("not " * 3000 + "key = 'a'", "nested more than"),
        ("key = '" + "a" * 1_000_000 + "'", "1,000,008 characters"),
    ],
    ids=range(7),
)
def test_what_is_too_much_is_refused(where: str, told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        parse(where)
