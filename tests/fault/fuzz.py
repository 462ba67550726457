"""Valid inputs with random damage, through reading and decoding: whatever comes, no crash, no hang, every row in balance.

    python -m tests.fault.fuzz --seconds 600             every path, 600 s each, with a seed of its own
    python -m tests.fault.fuzz --path tar --seed 7 --case 1234 --seconds 1    one case again

Cases run in a child, so that one that kills the process is told of too; what it was given is kept.
"""

from __future__ import annotations

import argparse
import faulthandler
import gzip
import io
import json
import random
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
import zlib
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from pipelines.config import DecodeConfig
from pipelines.errors import InputError
from pipelines.observe import peak_memory_mib
from tests.fault import through
from tests.fault.bad_images import BROKEN, ODD, plain
from tests.fault.bad_samples import KINDS, TARS, Put, member
from tests.unit.encoders.inputs import encoded

CASE_LIMIT_S = 30
MEMORY_LIMIT_MIB = 1024
READ = {"max_image_bytes": 2**20, "max_caption_bytes": 10_000, "rows_per_block": 16}
DECODE = DecodeConfig(max_pixels=2**22, rows_per_block=16)


# -- inputs --------------------------------------------------------------------------------------


@cache
def tars() -> list[bytes]:
    kinds = {kind.name: kind for kind in TARS}
    odd = b"".join(kind.put["tar"](f"k{n}").tar for n, kind in enumerate(kinds.values()))
    sample = [member(f"{n}.{ext}", data) for n in range(4) for ext, data in FILES]
    gnu = io.BytesIO()
    with tarfile.open(fileobj=gnu, mode="w", format=tarfile.GNU_FORMAT) as tar:
        for n in range(3):
            info = tarfile.TarInfo(f"{'d' * 120}/{n}.jpg")
            info.size = len(plain())
            tar.addfile(info, io.BytesIO(plain()))
    return [b"".join(sample) + bytes(1024), odd + bytes(1024), gnu.getvalue()]


FILES = [
    ("jpg", plain(size=(16, 16))),
    ("txt", b"a dog"),
    ("json", b'{"captions": ["a", "b"], "x": 1.5}'),
    ("cls", b"3"),
]


@cache
def parquets() -> list[bytes]:
    images = [plain(size=(16, 16), colour=(n, 9, 9)) for n in range(12)]
    structs = pa.array([{"bytes": image, "path": f"{n}.jpg"} for n, image in enumerate(images)])
    tables = [
        pa.table({"key": [str(n) for n in range(12)], "image": images, "caption": ["a dog"] * 12}),
        pa.table(
            {"image": structs, "sentences": [["a", None, "b"]] * 12, "x": pa.array([1.5] * 12), "none": pa.nulls(12)}
        ),
        pa.table(
            {
                "caption": pa.array(["a", "b", None] * 4).dictionary_encode(),
                "when": pa.array(range(12), pa.timestamp("us", "UTC")),
                "price": pa.array([1] * 12, pa.decimal128(9, 2)),
                "map": pa.array([[("a", 1)]] * 12, pa.map_(pa.string(), pa.int64())),
                "flag": [True, False, None] * 4,
                "mask": [bytes(90_000)] * 12,
            }
        ),
    ]
    written = []
    for table in tables:
        for compression in ("none", "snappy", "zstd"):
            file = io.BytesIO()
            pq.write_table(
                table,
                file,
                row_group_size=5,
                compression=compression,
                data_page_version="2.0" if compression == "zstd" else "1.0",
            )
            written.append(file.getvalue())
    return written


ROWS = [{"key": f"k{n}", "image": "images/a.jpg", "captions": ["a dog", 'a "cat", here'], "n": n} for n in range(6)]


@cache
def manifests() -> dict[str, list[bytes]]:
    """By the end of the file's name."""
    lines = "".join(json.dumps(row) + "\n" for row in ROWS).encode()
    karpathy = {
        "dataset": "x",
        "images": [
            {"filename": "a.jpg", "filepath": "images", "split": "test", "sentences": [{"raw": "a"}, {"raw": "b"}]}
        ]
        * 4,
    }
    rows = (
        b'key,image,caption\nk1,images/a.jpg,"a, ""dog"""\nk2,images/a.jpg,"two\nlines"\nk3,,plain\nk4,images/a.jpg,x\n'
    )
    kinds = [kind.put for kind in KINDS]
    return {
        ".jsonl": [lines, b"".join(_text(put, "jsonl", n) for n, put in enumerate(kinds[-40:]))],
        ".json": [json.dumps(karpathy).encode(), json.dumps(ROWS).encode(), lines],
        ".csv": [rows, b"key,image,caption\n" + b"".join(_text(put, "csv", n) for n, put in enumerate(kinds[-40:]))],
        ".tsv": [rows.replace(b",", b"\t")],
        ".jsonl.gz": [gzip.compress(lines)],
    }


def _text(put: dict[Any, Callable[[str], Put]], format_: str, number: int) -> bytes:
    found = put[format_](f"k{number}") if format_ in put else Put()
    return found.text if len(found.text) < 10_000 else b""


@cache
def images() -> list[bytes]:
    noise = Image.effect_noise((40, 30), 90)
    colour, clear = noise.convert("RGB"), noise.convert("RGBA")
    made = [
        encoded(image, kind, **options)
        for kind, image, options in (
            ("JPEG", colour, {}),
            ("JPEG", colour, {"progressive": True, "exif": b"Exif\0\0II*\0\x08\0\0\0" + bytes(9)}),
            ("JPEG", noise.convert("CMYK"), {}),
            ("PNG", colour, {}),
            ("PNG", clear.quantize(9), {}),
            ("PNG", Image.new("I;16", (20, 20), 99), {}),
            ("GIF", colour.quantize(30), {"save_all": True, "append_images": [noise.convert("P")]}),
            ("WEBP", colour, {}),
            ("WEBP", clear, {"lossless": True}),
            ("WEBP", colour, {"save_all": True, "append_images": [colour, clear.convert("RGB")]}),
            ("TIFF", colour, {}),
            ("TIFF", colour, {"compression": "tiff_lzw"}),
            ("TIFF", colour, {"compression": "jpeg"}),
            ("TIFF", noise.convert("1"), {"compression": "group4"}),
            ("TIFF", noise.convert("F"), {"compression": "tiff_deflate"}),
            ("BMP", colour, {}),
            ("BMP", clear, {}),
            ("PPM", colour, {}),
            ("ICO", clear, {"sizes": [(16, 16), (32, 32)]}),
            ("JPEG2000", colour, {}),
            ("JPEG2000", clear, {"irreversible": True, "tile_size": (16, 16)}),
            ("AVIF", colour, {}),
            ("AVIF", clear, {"save_all": True, "append_images": [clear]}),
            ("QOI", colour, {}),
            ("MPO", colour, {"save_all": True, "append_images": [colour]}),
        )
    ]
    return made + [picture.data for picture in (*BROKEN, *ODD) if len(picture.data) < 20_000]


# -- damage --------------------------------------------------------------------------------------

NUMBERS = [0, 1, 2, 7, 8, 255, 256, 0x7FFF, 0x8000, 0xFFFF, 0x10000, 2**31 - 1, 2**31, 2**32 - 1, 2**63 - 1, 2**64 - 1]
TOKENS = [
    b'"', b'""', b"'", b",", b"\n", b"\r", b"\r\n", b"\0", b"{", b"}", b"[", b"]", b":", b"\\", b"\\ud800", b"\\u0000",
    b"\xff", b"\xef\xbb\xbf", b"\xed\xa0\x80", b"null", b"true", b"-1", b"1e999", b"NaN", b"9" * 5_000, b"[" * 3_000,
    b'{"a":' * 900, b"\t", b"images", b'"images": [', b"../", b"/", b"://", b"file:///", b"s3://", b" " * 300,
]  # fmt: skip


def damaged(data: bytes, other: bytes, rng: random.Random, is_text: bool = False) -> bytes:
    """data with one to a few wounds; other: where a splice is taken from."""
    found = bytearray(data)
    for _ in range(rng.choice([1, 1, 1, 2, 3, 8])):
        if found:
            rng.choice(_TEXT_WOUNDS if is_text else _WOUNDS)(found, other, rng)
    return bytes(found)


def _place(data: bytearray, rng: random.Random) -> int:
    """Anywhere, but the ends more often: that is where headers and footers are."""
    length = len(data)
    near = min(length, 200)
    return rng.choice([rng.randrange(length), rng.randrange(near), length - 1 - rng.randrange(near)])


def _flip(data: bytearray, other: bytes, rng: random.Random) -> None:
    for _ in range(rng.choice([1, 1, 4, 30])):
        data[_place(data, rng)] ^= 1 << rng.randrange(8)


def _overwrite(data: bytearray, other: bytes, rng: random.Random) -> None:
    at = _place(data, rng)
    size = rng.choice([1, 2, 4, 8, 40])
    data[at : at + size] = rng.randbytes(size)[: len(data) - at]


def _number(data: bytearray, other: bytes, rng: random.Random) -> None:
    """A length field, perhaps, of 2, 4 or 8 bytes."""
    at, size = _place(data, rng), rng.choice([1, 2, 4, 8])
    value = (rng.choice(NUMBERS) + rng.choice([-1, 0, 0, 1])) % 256**size
    data[at : at + size] = value.to_bytes(size, rng.choice(["little", "big"]))[: len(data) - at]


def _cut(data: bytearray, other: bytes, rng: random.Random) -> None:
    del data[_place(data, rng) :]


def _remove(data: bytearray, other: bytes, rng: random.Random) -> None:
    at = _place(data, rng)
    del data[at : at + rng.choice([1, 2, 8, 100, 512, 2000])]


def _repeat(data: bytearray, other: bytes, rng: random.Random) -> None:
    at, size = _place(data, rng), rng.choice([1, 8, 100, 512, 2000])
    data[at:at] = data[at : at + size] * rng.choice([1, 1, 2, 20])


def _insert(data: bytearray, other: bytes, rng: random.Random) -> None:
    at = _place(data, rng)
    data[at:at] = rng.randbytes(rng.choice([1, 2, 4, 100, 512]))


def _splice(data: bytearray, other: bytes, rng: random.Random) -> None:
    start = rng.randrange(len(other)) if other else 0
    piece = other[start : start + rng.choice([8, 100, 512, 4000])]
    at = _place(data, rng)
    data[at : at + rng.choice([0, len(piece)])] = piece


def _token(data: bytearray, other: bytes, rng: random.Random) -> None:
    at = _place(data, rng)
    data[at : at + rng.choice([0, 0, 1, 5])] = rng.choice(TOKENS)


_WOUNDS = [_flip, _flip, _overwrite, _number, _number, _number, _cut, _remove, _repeat, _insert, _splice]
_TEXT_WOUNDS = [_token, _token, _token, _token, _flip, _overwrite, _cut, _remove, _repeat, _insert, _splice]


def with_checksums(data: bytes) -> bytes:
    """A damaged tar whose headers say that they are whole, so that the damage is read."""
    found = bytearray(data)
    for at in range(0, len(found) - 511, 512):
        if found[at + 257 : at + 262] == b"ustar":
            found[at + 148 : at + 156] = b"%06o\0 " % (
                sum(found[at : at + 148]) + 256 + sum(found[at + 156 : at + 512])
            )
    return bytes(found)


def with_crcs(data: bytes) -> bytes:
    """A damaged PNG whose chunks say that they are whole."""
    found, at = bytearray(data), 8
    while at + 12 <= len(found):
        end = at + 8 + int.from_bytes(found[at : at + 4])
        if end + 4 > len(found):
            break
        found[end : end + 4] = zlib.crc32(found[at + 4 : end]).to_bytes(4)
        at = end + 4
    return bytes(found)


# -- paths ---------------------------------------------------------------------------------------


def tar_case(rng: random.Random, folder: Path) -> Path:
    data = damaged(rng.choice(tars()), rng.choice(tars()), rng)
    data = with_checksums(data) if rng.random() < 0.6 else data
    if rng.random() < 0.3:
        packed = gzip.compress(data, 1)
        data = damaged(packed, b"", rng) if rng.random() < 0.5 else packed
    return _written(folder / "case.tar", data)


def parquet_case(rng: random.Random, folder: Path) -> Path:
    data, other = rng.choice(parquets()), rng.choice(parquets())
    footer_bytes = int.from_bytes(data[-8:-4], "little") + 8
    if rng.random() < 0.5:
        return _written(folder / "case.parquet", damaged(data, other, rng))
    pages, footer = data[:-footer_bytes], damaged(data[-footer_bytes:-8], other[-2000:], rng)
    return _written(folder / "case.parquet", pages + footer + len(footer).to_bytes(4, "little") + b"PAR1")


def manifest_case(rng: random.Random, folder: Path) -> Path:
    suffix = rng.choice(list(manifests()))
    found = manifests()[suffix]
    data = damaged(rng.choice(found), rng.choice(manifests()[".jsonl"]), rng, is_text=not suffix.endswith(".gz"))
    return _written(folder / f"case{suffix}", data)


def image_case(rng: random.Random, folder: Path) -> Path:
    """A folder of a few, which is faster than one each."""
    (folder / "case").mkdir()
    for number in range(20):
        data = rng.choice(images())
        hurt = damaged(data, rng.choice(images()), rng)
        _written(
            folder / "case" / f"{number:02d}.jpg",
            with_crcs(hurt) if data[1:4] == b"PNG" and rng.random() < 0.7 else hurt,
        )
    return folder / "case"


def _written(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


PATHS: dict[str, Callable[[random.Random, Path], Path]] = {
    "tar": tar_case,
    "parquet": parquet_case,
    "manifest": manifest_case,
    "image": image_case,
}


def run_case(path: str, seed: int, number: int, folder: Path) -> None:
    """Raises whatever the pipeline does but InputError, or AssertionError where rows are not in balance."""
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "images").mkdir(parents=True)
    (folder / "images" / "a.jpg").write_bytes(plain())
    (folder / "name").write_text(f"--path {path} --seed {seed} --case {number}")
    given = PATHS[path](random.Random(f"{path} {seed} {number}"), folder)
    try:
        through.rows_of(given, DECODE, "folder" if path == "image" else "auto", **READ)
    except InputError as error:
        assert error.what and error.fix
    assert peak_memory_mib() < MEMORY_LIMIT_MIB, f"{peak_memory_mib():.0f} MiB at the peak"


def run_cases(path: str, seed: int, seconds: float, folder: Path, first: int = 0) -> int:
    """How many were run. A case that takes too long ends the process, whatever it is in the middle of."""
    end, number = time.monotonic() + seconds, first
    while number == first or time.monotonic() < end:
        faulthandler.dump_traceback_later(CASE_LIMIT_S, exit=True)
        run_case(path, seed, number, folder)
        faulthandler.cancel_dump_traceback_later()
        number += 1
    return number - first


def in_child(path: str, seed: int, seconds: float, folder: Path, first: int = 0) -> tuple[bool, str]:
    """Whether all went well, and what the child said. What it was given last stays in the folder."""
    command = [sys.executable, "-X", "faulthandler", "-m", "tests.fault.fuzz", "--child", str(folder)]
    options = {"path": path, "seed": seed, "seconds": seconds, "case": first}
    asked = [f"--{name}={value}" for name, value in options.items()]
    done = subprocess.run([*command, *asked], capture_output=True, text=True, check=False)
    last = (folder / "name").read_text() if (folder / "name").exists() else "before the first case"
    return done.returncode == 0, f"{last}\nexit code {done.returncode}\n{done.stdout}\n{done.stderr[-6_000:]}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--path", choices=PATHS)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--seed", type=int, default=int(time.time()))
    parser.add_argument("--case", type=int, default=0, help="the first case")
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child:
        print(run_cases(given.path, given.seed, given.seconds, given.child, given.case), "cases")
        return
    failures = 0
    for path in [given.path] if given.path else PATHS:
        folder = Path(tempfile.mkdtemp(prefix=f"vecmill-fuzz-{path}-"))
        fine, told = in_child(path, given.seed, given.seconds, folder / "case", given.case)
        print(f"{path}: {'nothing found' if fine else f'FAILED, its input is in {folder}'}\n{told}", flush=True)
        failures += not fine
    sys.exit(1 if failures else 0)


if __name__ == "__main__":
    main()
