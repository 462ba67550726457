"""Image files that are broken, hostile, or only odd, made by hand where a library would refuse to.

An odd one is of one colour, so that what comes out can be known to be right.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache
from typing import Any

from PIL import Image

from pipelines.scenes.damage import png_chunk
from tests.unit.encoders.inputs import encoded

Colour = tuple[int, int, int]

RED: Colour = (180, 60, 90)
GREY: Colour = (90, 90, 90)
WHITE: Colour = (255, 255, 255)
GIF_FRAMES = 10_000


@dataclass(frozen=True)
class Picture:
    """An image file. reason: of its reject, or None where it is in truth fine and of `colour`."""

    name: str
    extension: str
    make: Callable[[], bytes]
    reason: str | None = None
    colour: Colour = RED

    @property
    def data(self) -> bytes:
        return _made(self)


@cache
def _made(picture: Picture) -> bytes:
    return picture.make()


def plain(kind: str = "JPEG", colour: Colour = RED, size: tuple[int, int] = (48, 32), **options: Any) -> bytes:
    return encoded(Image.new("RGB", size, colour), kind, **options)


def _cut(data: bytes, share: float = 0.5) -> bytes:
    return data[: int(len(data) * share)]


def _noisy(kind: str, **options: Any) -> bytes:
    """An image that no format makes small, so that half of the file is half of the pixels."""
    noise = Image.effect_noise((160, 120), 90).convert("RGB")
    return encoded(noise, kind, **options)


# -- PNG by hand ---------------------------------------------------------------------------------

Chunk = tuple[bytes, bytes]


def png(width: int, height: int, *chunks: Chunk, depth: int = 8, kind: int = 2, rows: bytes | None = None) -> bytes:
    """chunks: between the header and the rows. rows: filtered and deflated; RED where not given."""
    header = struct.pack(">IIBBBBB", width, height, depth, kind, 0, 0, 0)
    rows = zlib.compress((b"\0" + bytes(RED) * width) * height) if rows is None else rows
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        png_chunk(*chunk) for chunk in ((b"IHDR", header), *chunks, (b"IDAT", rows), (b"IEND", b""))
    )


def deflated(piece: bytes, times: int, level: int = 9) -> bytes:
    """`piece` again and again, without all of it in memory."""
    packer = zlib.compressobj(level)
    return b"".join([*(packer.compress(piece) for _ in range(times)), packer.flush()])


def _thirty_thousand_square() -> bytes:
    """900 million pixels, every one of them there: one bit each, and 110 KB in all."""
    return png(30_000, 30_000, depth=1, kind=0, rows=deflated(bytes(1 + 30_000 // 8), 30_000))


def _more_rows_than_said() -> bytes:
    """A zip bomb behind eight good rows."""
    packer = zlib.compressobj(9)
    first = packer.compress((b"\0" + bytes(RED) * 8) * 8)
    return png(8, 8, rows=first + b"".join(packer.compress(bytes(2**20)) for _ in range(64)) + packer.flush())


def _sixteen_bit_colour() -> bytes:
    pixel = b"".join(struct.pack(">H", value * 257) for value in RED)
    return png(8, 8, depth=16, rows=zlib.compress((b"\0" + pixel * 8) * 8))


def _bomb_in_a_chunk(name: bytes, start: bytes) -> bytes:
    return png(8, 8, (name, start + deflated(bytes(2**20), 80)))


def _wrong_checksum() -> bytes:
    data = bytearray(plain("PNG"))
    data[data.index(b"IHDR") + 4] ^= 1
    return bytes(data)


def _no_rows() -> bytes:
    whole = png(8, 8)
    return whole[: whole.index(b"IDAT") - 4] + whole[whole.index(b"IEND") - 4 :]


# -- GIF by hand ---------------------------------------------------------------------------------


def _many_frames() -> bytes:
    """A first frame in RED, and then one pixel in white again and again."""
    first = encoded(Image.new("RGB", (8, 8), RED).quantize(2), "GIF")
    frame = b"\x21\xf9\x04\x04\x01\x00\x00\x00" + b"," + struct.pack("<HHHHB", 0, 0, 1, 1, 0) + b"\x02\x02\x44\x01\x00"
    return first.removesuffix(b";") + frame * (GIF_FRAMES - 1) + b";"


def _cut_in_the_second_frame() -> bytes:
    """Behind the sign of an extension that says it is longer than the file."""
    first = encoded(Image.new("RGB", (8, 8), RED).quantize(2), "GIF")
    return first.removesuffix(b";") + b"\x21\xf9\x04\x04"


def _cut_in_the_second_descriptor() -> bytes:
    first = encoded(Image.new("RGB", (8, 8), RED).quantize(2), "GIF")
    return first.removesuffix(b";") + b"," + bytes(3)


# -- JPEG by hand --------------------------------------------------------------------------------


def _with_segments(segments: Iterable[tuple[int, bytes]]) -> bytes:
    """A good JPEG with segments (marker, payload) after its start."""
    data = plain()
    inserted = b"".join(b"\xff" + bytes([marker]) + struct.pack(">H", len(p) + 2) + p for marker, p in segments)
    return data[:2] + inserted + data[2:]


def _exif(payload: bytes) -> bytes:
    return _with_segments([(0xE1, b"Exif\0\0" + payload)])


def _exif_that_leads_to_itself() -> bytes:
    """One entry, an EXIF folder that is this very folder; the next folder is this one too."""
    entry = struct.pack("<HHII", 0x8769, 4, 1, 8)
    return _exif(b"II*\0" + struct.pack("<I", 8) + struct.pack("<H", 1) + entry + struct.pack("<I", 8))


def _exif_orientation(value: bytes, kind: int, count: int) -> bytes:
    entry = struct.pack("<HHI", 0x0112, kind, count) + value.ljust(4, b"\0")
    return _exif(b"II*\0" + struct.pack("<I", 8) + struct.pack("<H", 1) + entry + struct.pack("<I", 0))


def _says_size(height: int, width: int) -> bytes:
    data = bytearray(plain())
    at = data.index(b"\xff\xc0") + 5
    data[at : at + 4] = struct.pack(">HH", height, width)
    return bytes(data)


def _on_its_side() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    return plain(exif=exif.tobytes())


# -- others by hand ------------------------------------------------------------------------------


def _icon(inner: bytes) -> bytes:
    return struct.pack("<HHH", 0, 1, 1) + struct.pack("<BBBBHHII", 16, 16, 0, 0, 1, 32, len(inner), 22) + inner


def _large_canvas() -> bytes:
    """A WebP whose canvas is 16,384 pixels a side, and whose one frame is small."""
    frame = plain("WEBP", lossless=True)[12:]
    side = struct.pack("<I", 16_383)[:3]
    body = b"WEBP" + b"VP8X" + struct.pack("<I", 10) + bytes(4) + side + side + frame
    return b"RIFF" + struct.pack("<I", len(body)) + body


def _tiff_that_leads_to_itself() -> bytes:
    return b"II*\0" + struct.pack("<I", 8) + struct.pack("<H", 0) + struct.pack("<I", 8)


def _tiff_of_many_strips() -> bytes:
    """A strip table that says it has 4 thousand million entries."""
    entries = [(256, 3, 1, 64), (257, 3, 1, 64), (258, 3, 1, 8), (259, 3, 1, 1), (262, 3, 1, 1), (273, 4, 2**32 - 1, 8)]
    packed = b"".join(struct.pack("<HHII", *entry) for entry in entries)
    return b"II*\0" + struct.pack("<I", 8) + struct.pack("<H", len(entries)) + packed + struct.pack("<I", 0)


def _bmp_that_claims(width: int, height: int) -> bytes:
    header = struct.pack("<IiiHHIIiiII", 40, width, height, 1, 24, 0, 0, 0, 0, 0, 0)
    return b"BM" + struct.pack("<IHHI", 54 + 12, 0, 0, 54) + header + bytes(12)


def _see_through() -> bytes:
    return encoded(Image.new("RGBA", (8, 8), (0, 0, 0, 0)), "PNG")


def _palette_with_hole() -> bytes:
    return encoded(Image.new("RGB", (8, 8), RED).quantize(2), "PNG", transparency=0)


def _mpo() -> bytes:
    return encoded(
        Image.new("RGB", (48, 32), RED), "MPO", save_all=True, append_images=[Image.new("RGB", (48, 32), WHITE)]
    )


def _animated(kind: str) -> bytes:
    frames = [Image.new("RGB", (16, 16), (index, index, index)) for index in range(20)]
    return encoded(Image.new("RGB", (16, 16), RED), kind, save_all=True, append_images=frames)


SVG = b'<?xml version="1.0"?><svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"><rect/></svg>\n'
HTML = b"<!doctype html><html><head><title>403 Forbidden</title></head><body>Forbidden</body></html>\n"
EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n"
HEIC = struct.pack(">I", 24) + b"ftypheic" + bytes(4) + b"mif1heic" + bytes(400)
MP4 = struct.pack(">I", 24) + b"ftypisom" + bytes(4) + b"isomiso2" + bytes(400)

UNIDENTIFIED, TRUNCATED = "unidentified_image", "truncated_image"
TOO_MANY, FAILED, EMPTY = "too_many_pixels", "decode_failed", "empty_image"

BROKEN = [
    Picture("zero bytes", "jpg", bytes, EMPTY),
    Picture("one byte", "jpg", lambda: b"\xff", UNIDENTIFIED),
    Picture("an SVG named .jpg", "jpg", lambda: SVG, UNIDENTIFIED),
    Picture("a web page named .jpg", "jpg", lambda: HTML, UNIDENTIFIED),
    Picture("an EPS, which is a program", "jpg", lambda: EPS, UNIDENTIFIED),
    Picture("a PDF named .png", "png", lambda: b"%PDF-1.7\n1 0 obj<<>>endobj\n%%EOF\n", UNIDENTIFIED),
    Picture("a zip named .png", "png", lambda: b"PK\x03\x04" + bytes(60), UNIDENTIFIED),
    Picture("a gzip named .webp", "webp", lambda: b"\x1f\x8b\x08\0" + bytes(40), UNIDENTIFIED),
    Picture("a film named .jpg", "jpg", lambda: MP4, UNIDENTIFIED),
    Picture("a HEIC", "heic", lambda: HEIC, UNIDENTIFIED),
    Picture("a JPEG XL", "jxl", lambda: b"\xff\x0a" + bytes(60), UNIDENTIFIED),
    Picture("noise", "jpg", lambda: bytes(range(256)) * 9, UNIDENTIFIED),
    Picture("NUL bytes", "png", lambda: bytes(4096), UNIDENTIFIED),
    Picture("the first bytes of a JPEG", "jpg", lambda: plain()[:3], TRUNCATED),
    Picture("a JPEG cut in the header", "jpg", lambda: plain()[:20], TRUNCATED),
    Picture("half a JPEG", "jpg", lambda: _cut(_noisy("JPEG")), TRUNCATED),
    Picture("half a progressive JPEG", "jpg", lambda: _cut(_noisy("JPEG", progressive=True)), TRUNCATED),
    Picture("half a PNG", "png", lambda: _cut(_noisy("PNG")), TRUNCATED),
    Picture("half a GIF", "gif", lambda: _cut(_noisy("GIF")), TRUNCATED),
    Picture("half a BMP", "bmp", lambda: _cut(_noisy("BMP")), TRUNCATED),
    Picture("half a TIFF", "tif", lambda: _cut(_noisy("TIFF", compression="tiff_lzw")), TRUNCATED),
    Picture("half a WebP", "webp", lambda: _cut(_noisy("WEBP", lossless=True)), TRUNCATED),
    Picture("half an AVIF", "avif", lambda: _cut(_noisy("AVIF")), TRUNCATED),
    Picture("half a JPEG 2000", "jp2", lambda: _cut(_noisy("JPEG2000")), TRUNCATED),
    Picture("a PNG without rows", "png", _no_rows, FAILED),
    Picture("a PNG with a wrong checksum", "png", _wrong_checksum, FAILED),
    Picture("a PNG of no size", "png", lambda: png(0, 0), FAILED),
    Picture("a PNG of 30,000 by 30,000", "png", _thirty_thousand_square, TOO_MANY),
    Picture("a PNG that claims 2,000,000,000 by 1", "png", lambda: png(2_000_000_000, 1, rows=b""), TOO_MANY),
    Picture("a JPEG that claims 65,500 by 65,500", "jpg", lambda: _says_size(65_500, 65_500), TOO_MANY),
    Picture("a JPEG of no height", "jpg", lambda: _says_size(0, 48), FAILED),
    Picture("a WebP with a canvas of 16,384 by 16,384", "webp", _large_canvas, TOO_MANY),
    Picture("a BMP that claims 60,000 by 60,000", "bmp", lambda: _bmp_that_claims(60_000, 60_000), TOO_MANY),
    Picture("a PPM that claims 1,000,000,000 by 1", "ppm", lambda: b"P6\n1000000000 1\n255\n" + bytes(30), TOO_MANY),
    Picture("a bomb in an icon", "jpg", lambda: _icon(_thirty_thousand_square()), TOO_MANY),
    Picture("an icon of nothing", "jpg", lambda: struct.pack("<HHH", 0, 1, 0), FAILED),
    Picture("a zip bomb in a text chunk", "png", lambda: _bomb_in_a_chunk(b"zTXt", b"Comment\0\0"), FAILED),
    Picture("a zip bomb in a profile", "png", lambda: _bomb_in_a_chunk(b"iCCP", b"icc\0\0"), FAILED),
    Picture("a GIF of no frames", "gif", lambda: b"GIF89a" + struct.pack("<HHBBB", 8, 8, 0, 0, 0) + b";", FAILED),
    Picture("a TIFF that leads to itself", "tif", _tiff_that_leads_to_itself, FAILED),
    Picture("a TIFF of 4 thousand million strips", "tif", _tiff_of_many_strips, FAILED),
]

ODD = [
    Picture("a JPEG in CMYK", "jpg", lambda: encoded(Image.new("RGB", (48, 32), RED).convert("CMYK"), "JPEG")),
    Picture("a progressive JPEG", "jpg", lambda: plain(progressive=True)),
    Picture("a PNG named .jpg", "jpg", lambda: plain("PNG")),
    Picture("a JPEG on its side", "jpg", _on_its_side),
    Picture("a JPEG with an ICC profile of garbage", "jpg", lambda: plain(icc_profile=b"garbage" * 99)),
    Picture("a PNG with an ICC profile of garbage", "png", lambda: png(8, 8, (b"iCCP", b"icc\0\0not deflated"))),
    Picture("a JPEG with EXIF of garbage", "jpg", lambda: _exif(b"II*\0garbage" * 99)),
    Picture("a JPEG with EXIF that leads to itself", "jpg", _exif_that_leads_to_itself),
    Picture("a JPEG with orientation 77", "jpg", lambda: _exif_orientation(struct.pack("<H", 77), 3, 1)),
    Picture("a JPEG with an orientation of text", "jpg", lambda: _exif_orientation(b"up", 2, 3)),
    Picture("a JPEG with 60,000 bytes of EXIF", "jpg", lambda: _exif(b"II*\0" + b"\x08\0\0\0" + b"\xff" * 60_000)),
    Picture("a JPEG with 3,000 comments", "jpg", lambda: _with_segments([(0xFE, b"comment")] * 3_000)),
    Picture("a JPEG with a zip behind it", "jpg", lambda: plain() + b"PK\x03\x04" + bytes(5_000)),
    Picture("a film strip of JPEGs", "jpg", _mpo),
    Picture("a PNG of one pixel", "png", lambda: plain("PNG", size=(1, 1))),
    Picture("a PNG of 1 by 20,000", "png", lambda: plain("PNG", size=(1, 20_000))),
    Picture("a PNG of 20,000 by 1", "png", lambda: plain("PNG", size=(20_000, 1))),
    Picture("a PNG with a zip bomb behind its rows", "png", _more_rows_than_said),
    Picture("a PNG of 2,000 empty pieces", "png", lambda: png(8, 8, *[(b"IDAT", b"")] * 2_000)),
    Picture("a PNG of 16 bits in colour", "png", _sixteen_bit_colour),
    Picture("a PNG of 16 bits in grey", "png", lambda: encoded(Image.new("I;16", (8, 8), 90 * 257), "PNG"), None, GREY),
    Picture("a PNG of one bit", "png", lambda: encoded(Image.new("1", (8, 8), 1), "PNG"), None, WHITE),
    Picture("a PNG that is all transparent", "png", _see_through, None, WHITE),
    Picture("a palette with its one colour transparent", "png", _palette_with_hole, None, WHITE),
    Picture("a TIFF of floats", "tif", lambda: encoded(Image.new("F", (8, 8), 90 / 255), "TIFF"), None, GREY),
    Picture("a TIFF in CMYK", "tif", lambda: encoded(Image.new("RGB", (8, 8), RED).convert("CMYK"), "TIFF")),
    Picture("a GIF of 10,000 frames", "gif", _many_frames),
    Picture("a GIF cut within its second frame's extension", "gif", _cut_in_the_second_frame),
    Picture("a GIF cut within its second frame's descriptor", "gif", _cut_in_the_second_descriptor),
    Picture("a WebP that moves", "webp", lambda: _animated("WEBP")),
    Picture("a PNG that moves", "png", lambda: _animated("PNG")),
    Picture("an AVIF", "avif", lambda: plain("AVIF")),
]
