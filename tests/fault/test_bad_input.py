"""Promise P3 over whole inputs: what is bad is one reject with a truthful reason, what is not comes through, and
nothing is missing."""

from __future__ import annotations

import gzip
import io
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines.errors import InputError
from tests.fault import through
from tests.fault.bad_images import HTML, plain
from tests.fault.bad_samples import FORMATS, MAX_IMAGE_BYTES, Format, Rejected, Row, good, kinds_of, member, mixed

SEEDS = (0, 1)
GOODS = 40


def as_row(found: through.Row) -> Row:
    """What a row of PIXELS is, in the words of what must come of it."""
    why = through.reasons(found, "image")
    colour = None
    if found["pixels"] is not None:
        pixels = np.frombuffer(found["pixels"], np.uint8).reshape(-1, 3)
        assert np.ptp(pixels, axis=0).max() <= 2, f"{found['key']} is not of one colour"
        red, green, blue = (int(value) for value in pixels[0])
        colour = (red, green, blue)
    return Row(found["key"], Rejected(why[0]) if why else colour, tuple(through.captions(found, Rejected)))


def matches(found: Row, expected: Row) -> bool:
    """Colours may be a little off: JPEG and AVIF round."""
    if expected.key is not None and found.key != expected.key:
        return False
    if isinstance(found.image, tuple) and isinstance(expected.image, tuple):
        near = max(abs(a - b) for a, b in zip(found.image, expected.image, strict=True)) <= 3
        return near and found.captions == expected.captions
    return (found.image, found.captions) == (expected.image, expected.captions)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("format_", FORMATS)
def test_every_kind_of_bad_sample_among_good_ones(format_: Format, seed: int, tmp_path: Path) -> None:
    kinds = kinds_of(format_)
    wanted = mixed(format_, kinds, GOODS, seed, tmp_path)
    found = [as_row(row) for row in through.rows_of(wanted.uri, max_image_bytes=MAX_IMAGE_BYTES)]
    first = next((n for n, (f, e) in enumerate(zip(found, wanted.rows, strict=False)) if not matches(f, e)), None)
    at = min(len(found), len(wanted.rows)) if first is None else first
    kind = wanted.kind_of_row[at] if at < len(wanted.rows) else "nothing"
    assert len(found) == len(wanted.rows), f"seed {seed}: from row {at} on, {kind}"
    assert first is None, f"seed {seed}: {kind}: {found[at]}, not {wanted.rows[at]}"


def test_there_are_enough_kinds() -> None:
    """And each has a name of its own, so that a failure says which."""
    for format_ in FORMATS:
        names = [kind.name for kind in kinds_of(format_)]
        assert len(names) == len(set(names)) and len(names) >= 80


def test_every_reject_has_a_detail_that_says_something(tmp_path: Path) -> None:
    wanted = mixed("tar", kinds_of("tar"), 0, 0, tmp_path)
    for row in through.rows_of(wanted.uri, max_image_bytes=MAX_IMAGE_BYTES):
        for reject in row["rejects"]:
            assert reject["detail"] and "\n" not in reject["detail"] and " object at 0x" not in reject["detail"]
            assert "BytesIO" not in reject["detail"]


# -- whole shards --------------------------------------------------------------------------------


def goods(format_: Format, count: int, folder: Path, first: int = 0) -> tuple[Path, list[Row]]:
    folder.mkdir(exist_ok=True)
    wanted = mixed(format_, [good(first + number) for number in range(count)], 0, 0, folder)
    return wanted.uri, wanted.rows


def summary(rows: list[through.Row]) -> list[str]:
    """A word a row: `ok`, or the reason of its first reject."""
    return [next((reject["reason"] for reject in row["rejects"]), "ok") for row in rows]


def tar_parts() -> list[bytes]:
    return [member(f"{key}.{ext}", data) for key in "abc" for ext, data in (("jpg", plain()), ("txt", b"fine"))]


def places_to_cut() -> Iterator[tuple[str, int, list[str]]]:
    """Where a tar of three samples can be cut, and what must be told."""
    parts = tar_parts()
    picture = 512 + len(plain())
    after_two = sum(map(len, parts[:4]))
    cut = ["ok", "ok", "truncated_shard"]
    yield "nothing at all", 0, ["truncated_shard"]
    yield "within the first header", 300, ["truncated_shard"]
    yield "behind the first header", 512, ["truncated_shard"]
    yield "between samples", after_two, cut
    yield "within a header", after_two + 100, cut
    yield "within an image", after_two + picture // 2, cut
    yield "within an image's padding", after_two + picture + 5, ["ok", "ok", "ok", "truncated_shard"]
    yield "between an image and its caption", after_two + len(parts[4]), ["ok", "ok", "ok", "truncated_shard"]
    yield "within a caption", after_two + len(parts[4]) + 514, cut
    yield "before the end mark", sum(map(len, parts)), ["ok", "ok", "ok", "truncated_shard"]
    yield "within the end mark", sum(map(len, parts)) + 512, ["ok"] * 3
    yield "nowhere", sum(map(len, parts)) + 1024, ["ok"] * 3


@pytest.mark.parametrize(("at", "told"), [pytest.param(at, told, id=where) for where, at, told in places_to_cut()])
def test_a_tar_that_is_cut(at: int, told: list[str], tmp_path: Path) -> None:
    whole = b"".join(tar_parts()) + bytes(1024)
    (tmp_path / "a.tar").write_bytes(whole[:at])
    assert summary(through.rows_of(tmp_path / "a.tar")) == told


NOISE = bytes(np.random.default_rng(0).integers(0, 256, 60_000, np.uint8))
LONG_TAR = b"".join(member(f"{n}.jpg", plain()) + member(f"{n}.bin", NOISE[n:]) for n in range(4)) + bytes(1024)


@cache
def whole_tars() -> dict[str, tuple[bytes, list[str]]]:
    packed = gzip.compress(LONG_TAR, mtime=0)
    padded = LONG_TAR + bytes(65 * 2**20) + member("z.jpg", plain()) + bytes(1024)
    damaged = bytearray(packed)
    damaged[len(packed) // 2 : len(packed) // 2 + 99] = bytes(99)
    broken_header = bytearray(LONG_TAR)
    broken_header[LONG_TAR.index(b"2.jpg")] ^= 0x55
    return {
        "a tar of no members": (bytes(10240), []),
        "a web page": (HTML * 20, ["corrupt_shard"]),
        "noise": (NOISE, ["corrupt_shard"]),
        "a broken header": (bytes(broken_header), ["ok", "ok", "corrupt_shard"]),
        "two tars end to end": (LONG_TAR + member("z.jpg", plain()) + bytes(1024), ["ok"] * 5),
        "noise behind the end mark": (LONG_TAR + NOISE, ["ok"] * 4),
        "a gzip": (packed, ["ok"] * 4),
        "half a gzip": (packed[: len(packed) // 2], ["ok", "truncated_shard"]),
        "a gzip without its checksum": (packed[:-8], ["ok"] * 4),
        "a gzip of nothing": (gzip.compress(b"", mtime=0), ["truncated_shard"]),
        "a gzip of noise": (gzip.compress(NOISE, mtime=0), ["corrupt_shard"]),
        "a gzip's first two bytes": (b"\x1f\x8b", ["truncated_shard"]),
        "a gzip with a wrong checksum": (packed[:-8] + bytes(8), ["ok"] * 4 + ["corrupt_shard"]),
        "a gzip of zeros without end": (gzip.compress(bytes(2**27), mtime=0), ["corrupt_shard"]),
        "a member behind 65 MiB of zeros": (padded, ["ok"] * 4 + ["corrupt_shard"]),
    }


@pytest.mark.parametrize("name", whole_tars())
def test_a_tar_that_is_bad_as_a_whole(name: str, tmp_path: Path) -> None:
    data, told = whole_tars()[name]
    (tmp_path / "a.tar").write_bytes(data)
    (tmp_path / "b.tar").write_bytes(LONG_TAR)
    assert summary(through.rows_of([tmp_path / "a.tar"])) == told
    assert summary(through.rows_of(tmp_path)) == [*told, *["ok"] * 4]


def table(**columns: list[object]) -> bytes:
    file = io.BytesIO()
    pq.write_table(pa.table(columns), file)
    return file.getvalue()


@cache
def whole_parquets() -> dict[str, tuple[bytes, str]]:
    fine = table(image=[plain()] * 3, caption=["fine"] * 3)
    return {
        "zero bytes": (b"", "corrupt_shard"),
        "four bytes": (b"PAR1", "corrupt_shard"),
        "a web page": (HTML, "corrupt_shard"),
        "noise": (NOISE, "corrupt_shard"),
        "a footer cut": (fine[:-20], "corrupt_shard"),
        "the second half": (fine[len(fine) // 2 :], "corrupt_row_group"),
        "a footer of noise": (fine[:-200] + NOISE[:192] + fine[-8:], "corrupt_shard"),
        "a footer longer than the file": (fine[:-8] + b"\xff\xff\xff\x7fPAR1", "corrupt_shard"),
        "columns of another table": (table(n=[1, 2]), "wrong_columns"),
        "no columns": (table(), "wrong_columns"),
    }


@pytest.mark.parametrize("place", ["first", "last"])
@pytest.mark.parametrize("name", whole_parquets())
def test_a_parquet_that_is_bad_as_a_whole_among_good_ones(name: str, place: str, tmp_path: Path) -> None:
    """Whether planning looks at it or not: the good ones are read, and it is told of."""
    data, reason = whole_parquets()[name]
    (tmp_path / ("a.parquet" if place == "first" else "z.parquet")).write_bytes(data)
    for letter in "mn":
        (tmp_path / f"{letter}.parquet").write_bytes(table(image=[plain()] * 3, caption=["fine"] * 3))
    told = summary(through.rows_of(tmp_path))
    assert told.count("ok") == 6 and set(told) == {"ok", reason}
    assert len(told) == (9 if reason == "corrupt_row_group" else 7)


def test_a_torn_parquet_alone_is_a_reject(tmp_path: Path) -> None:
    (tmp_path / "a.parquet").write_bytes(table(caption=["fine"])[:-20])
    assert summary(through.rows_of(tmp_path / "a.parquet")) == ["corrupt_shard"]


def test_a_parquet_cut_in_the_middle_of_its_rows_keeps_the_others(tmp_path: Path) -> None:
    file = io.BytesIO()
    rows = pa.table({"image": [plain() + NOISE[n:] for n in range(6)]})
    pq.write_table(rows, file, row_group_size=2, use_dictionary=False, compression="none")
    data = bytearray(file.getvalue())
    start = pq.ParquetFile(file).metadata.row_group(1).column(0).data_page_offset
    data[start : start + 50] = NOISE[:50]
    (tmp_path / "a.parquet").write_bytes(data)
    assert summary(through.rows_of(tmp_path / "a.parquet")) == ["ok"] * 2 + ["corrupt_row_group"] * 2 + ["ok"] * 2


def test_a_footer_that_would_end_the_process_is_a_reject(tmp_path: Path) -> None:
    """Found by fuzzing. pyarrow 23 throws where nothing catches when it is asked for the sizes of such columns."""
    required = (b"\x25\x02\x18\x04mask", b"\x25\x00\x18\x04mask")
    whole = table(image=[plain()], mask=[bytes(200_000)])
    assert whole.count(required[0]) == 1
    (tmp_path / "a.parquet").write_bytes(whole.replace(*required))
    (tmp_path / "b.parquet").write_bytes(whole)
    code = f"from tests.fault import through; print([r['rejects'] for r in through.rows_of({str(tmp_path)!r})])"
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert told.returncode == 0, told.stderr
    assert told.stdout.count("corrupt_row_group") == 1 and told.stdout.count("reason") == 1


def line(**fields: object) -> bytes:
    return json.dumps(fields).encode() + b"\n"


MANY_LINES = b"".join(line(key=str(n), caption=f"{n} of many {NOISE[n * 9 : n * 9 + 99].hex()}") for n in range(200))
KARPATHY = {"images": [{"filename": "none.jpg", "split": "train", "sentences": [{"raw": "a"}]}] * 3}


@pytest.mark.parametrize(
    ("name", "data", "told"),
    [
        ("a.jsonl", HTML, ["bad_manifest_line"]),
        ("a.jsonl", MANY_LINES[:-20], ["ok"] * 199 + ["bad_manifest_line"]),
        ("a.jsonl", NOISE[:99].replace(b"\n", b"") + b"\n" + line(caption="fine"), ["bad_manifest_line", "ok"]),
        ("a.jsonl.gz", gzip.compress(MANY_LINES, mtime=0)[:-8], ["ok"] * 200 + ["bad_manifest_line"]),
        ("a.jsonl.gz", b"\x1f\x8b" + NOISE[:99], ["bad_manifest_line"]),
        ("a.json", json.dumps([{"caption": "a"}, {"caption": "b"}])[:-6].encode(), ["ok", "bad_manifest_line"]),
        ("a.json", b'[{"caption": "a"}, 7, null, {"caption": "b"}]', ["ok", "bad_manifest_line", "bad_manifest_line", "ok"]),
        ("a.json", json.dumps(KARPATHY).encode()[:-30], ["not_found", "bad_manifest_line"]),
        ("a.csv", b"key,caption\n1,fine\n2,\xff\xfe\n3,fine\n", ["ok", "not_utf8", "ok"]),
        ("a.csv", b'key,caption\n1,fine\n2,"open\n3,fine\n4,fine', ["ok", "bad_manifest_line", "ok", "ok"]),
        ("a.csv.gz", gzip.compress(b"key,caption\n1,fine\n2,fine\n", mtime=0)[:-8], ["ok", "ok", "bad_manifest_line"]),
        ("a.tsv", b"key\tcaption\n1\tfine\n2\n", ["ok", "bad_manifest_line"]),
    ],
)  # fmt: skip
def test_a_manifest_that_is_bad_in_part(name: str, data: bytes, told: list[str], tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(data)
    assert summary(through.rows_of(tmp_path / name)) == told


@pytest.mark.parametrize(
    ("name", "data", "problem"),
    [
        ("a.jsonl", b"", "has no rows"),
        ("a.jsonl", b"\n\n", "has no rows"),
        ("a.csv", b"", "has no rows"),
        ("a.csv", b"key,caption\n", "has no rows"),
        ("a.csv", b"a,b\n1,2\n", "has no field known"),
        ("a.jsonl", b"no JSON\n" + line(a=1), "has no field known"),
        ("a.json", HTML, "is no manifest"),
        ("a.json", NOISE, "is no manifest"),
        ("a.json", b"[]", "has no rows"),
        ("a.json", b'{"images": [{"id": 1, "file_name": "a.jpg"}]}', "not Karpathy's"),
        ("a.txt", b"\n# nothing\n", "lists nothing"),
        ("a.parquet", table(n=[1]), "has no column known"),
        ("a.xyz", b"abc", "is of no known format"),
        ("folder/.hidden", b"", "is empty"),
    ],
)
def test_a_run_that_cannot_begin_names_the_object_and_what_to_do(
    name: str, data: bytes, problem: str, tmp_path: Path
) -> None:
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(data)
    given = path.parent if name.startswith("folder") else path
    with pytest.raises(InputError, match=problem) as refused:
        through.rows_of(given)
    assert str(given) in refused.value.what and refused.value.fix


def test_a_folder_of_broken_links_and_pipes(tmp_path: Path) -> None:
    """What is no file has no bytes, and a pipe would be waited for."""
    uri, rows = goods("folder", 3, tmp_path)
    (uri / "broken.jpg").symlink_to("/nowhere/none.jpg")
    os.mkfifo(uri / "pipe.jpg")
    assert summary(through.rows_of(uri)) == ["ok"] * len(rows)
