"""Promise P8 for decoding: the largest images that the settings let pass, in the formats that take the most memory."""

from __future__ import annotations

import io
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from pipelines.config import BLOCK_BYTES, BYTES_PER_PIXEL, ClusterConfig, DecodeConfig
from pipelines.contracts import Reject
from pipelines.decode import open_image
from tests.fault.bad_images import RED, deflated, png

PIXELS = 8 * 2**20
SIDEWAYS = Image.Exif()
SIDEWAYS[0x0112] = 6

CHILD = """
import sys
from pipelines.config import DecodeConfig
from pipelines.observe import peak_memory_mib
from tests.fault import through

rows = through.rows_of(sys.argv[1], DecodeConfig(max_pixels=int(sys.argv[2])), "folder")
rejects = [(row["key"], reject["reason"]) for row in rows for reject in row["rejects"]]
print(len(rows), rejects, round(peak_memory_mib()), sep="|")
"""


def peak_mib(folder: Path, max_pixels: int) -> tuple[int, str, int]:
    """Rows, rejects, and the most memory that a process took to read and decode a folder."""
    command = [sys.executable, "-c", CHILD, str(folder), str(max_pixels)]
    rows, rejects, peak = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split("|")
    return int(rows), rejects, int(peak)


def of_one_colour(pixels: int) -> Image.Image:
    return Image.new("RGB", (4096, pixels // 4096), RED)


def write_heaviest(folder: Path, pixels: int) -> int:
    """As many pixels each as its format is allowed, most of them to be turned; how many images."""
    image = of_one_colour(pixels)
    allowed = pixels * BYTES_PER_PIXEL + BLOCK_BYTES
    exif = SIDEWAYS.tobytes()
    image.save(folder / "plain.jpg", exif=exif)
    almost = of_one_colour(pixels - 2**18)  # the file counts too
    almost.save(folder / "progressive.jpg", progressive=True, subsampling=0, exif=exif)
    almost.convert("CMYK").save(folder / "cmyk.jpg", progressive=True, exif=exif)
    image.convert("RGBA").save(folder / "alpha.png", compress_level=1, exif=exif)
    image.quantize(2).save(folder / "palette.png", transparency=0, exif=exif)
    Image.new("I;16", image.size, 9_000).save(folder / "sixteen.png", compress_level=1, exif=exif)
    image.quantize(2).save(folder / "moves.gif", save_all=True, append_images=[Image.new("P", (9, 9))])
    Image.new("F", almost.size, 0.5).save(folder / "float.tif", compression="tiff_deflate")
    image = of_one_colour(allowed // 20 - 2**18)
    image.convert("RGBA").save(folder / "film.webp", save_all=True, append_images=[image], lossless=True, method=0)
    image.save(folder / "still.avif", speed=10, subsampling="4:4:4")
    of_one_colour(allowed // 28 - 2**18).convert("RGBA").save(folder / "cinema.jp2")
    return 11


def test_the_heaviest_images_stay_within_what_a_decode_task_may_take(tmp_path: Path) -> None:
    count = write_heaviest(tmp_path, PIXELS)
    rows, rejects, peak = peak_mib(tmp_path, PIXELS)
    assert (rows, rejects) == (count, "[]")
    assert peak < DecodeConfig(max_pixels=PIXELS).peak_mib


def test_an_image_of_the_most_pixels_allowed_by_default_fits_the_default_memory(tmp_path: Path) -> None:
    """Transparent, and turned: the heaviest of the formats that may have all of them."""
    pixels = DecodeConfig().max_pixels
    height = pixels // 8192
    row = b"\0" + bytes([*RED, 128]) * 8192
    exif = (b"eXIf", SIDEWAYS.tobytes().removeprefix(b"Exif\0\0"))
    (tmp_path / "a.png").write_bytes(png(8192, height, exif, kind=6, rows=deflated(row, height, 1)))
    rows, rejects, peak = peak_mib(tmp_path, pixels)
    assert (rows, rejects) == (1, "[]")
    assert peak < ClusterConfig().memory_per_decode_task_mib


@pytest.mark.parametrize("kind", ["WEBP", "AVIF", "JPEG2000"])
def test_a_format_that_takes_more_memory_may_have_fewer_pixels(kind: str) -> None:
    file = io.BytesIO()
    of_one_colour(PIXELS).save(file, kind, **({"speed": 10} if kind == "AVIF" else {}))
    refused = open_image(file.getvalue(), PIXELS)
    assert isinstance(refused, Reject) and refused.reason == "too_many_pixels"
    assert f"of {kind} take" in refused.detail
    assert not isinstance(open_image(file.getvalue(), 3 * PIXELS), Reject)
