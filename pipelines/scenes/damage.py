"""Samples broken on purpose, and odd ones that must come through: what the web really serves.

The one place that says which sample of a set of shards is which, for the writer and for whoever
compares the rejects of a run with it.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass

from PIL import Image

from pipelines.contracts import Modality
from pipelines.errors import ConfigError
from pipelines.scenes.compose import Scene, jpeg

Files = dict[str, bytes]
"""A sample's files by extension."""

ORIENTATION_TAG = 0x0112
BOMB_SIDE_PIXELS = 40_000


@dataclass(frozen=True)
class Damage:
    """What was done to a sample. modality: of the item that must be rejected, None where none may be."""

    what: str
    modality: Modality | None
    apply: Callable[[Scene, Files], Files]


def key_of(index: int) -> str:
    return f"scene-{index:06d}"


def planned_damage(samples: int, broken: int) -> dict[int, Damage]:
    """Sample index → what `write_shards` does to it: `broken` broken ones and two odd ones, evenly spread.

    Raises: ConfigError where there are too few samples for that.
    """
    chosen = [BROKEN[k % len(BROKEN)] for k in range(broken)] + ODD
    if samples <= len(chosen):
        raise ConfigError(
            f"{samples} samples are too few for {broken} broken and {len(ODD)} odd ones",
            f"Ask for more than {len(chosen)} samples, or fewer broken ones.",
        )
    return {(k + 1) * samples // (len(chosen) + 1): damage for k, damage in enumerate(chosen)}


def _cut_off(scene: Scene, files: Files) -> Files:
    whole = jpeg(scene.image)
    return _with_image(files, "jpg", whole[: len(whole) // 2])


def _empty(scene: Scene, files: Files) -> Files:
    return _with_image(files, "jpg", b"")


def _web_page(scene: Scene, files: Files) -> Files:
    page = b"<!doctype html><html><head><title>403 Forbidden</title></head><body>Forbidden</body></html>\n"
    return _with_image(files, "jpg", page)


def _latin_1(scene: Scene, files: Files) -> Files:
    return files | {"txt": f"{scene.captions[0]} \N{EN DASH} déjà vu".encode("cp1252")}


def _unknown(scene: Scene, files: Files) -> Files:
    return {"raw7": scene.image.tobytes()}


def _bomb(scene: Scene, files: Files) -> Files:
    """A PNG of 112 bytes that says it has 1.6 thousand million pixels."""
    header = struct.pack(">IIBBBBB", BOMB_SIDE_PIXELS, BOMB_SIDE_PIXELS, 8, 2, 0, 0, 0)
    chunks = (png_chunk(b"IHDR", header), png_chunk(b"IDAT", zlib.compress(bytes(1024))), png_chunk(b"IEND", b""))
    return _with_image(files, "png", b"\x89PNG\r\n\x1a\n" + b"".join(chunks))


def png_chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def _on_its_side(scene: Scene, files: Files) -> Files:
    """As a camera held upright stores it: pixels turned, orientation 6 to turn them back."""
    exif = Image.Exif()
    exif[ORIENTATION_TAG] = 6
    return _with_image(files, "jpg", jpeg(scene.image.transpose(Image.Transpose.ROTATE_90), exif=exif.tobytes()))


def _for_print(scene: Scene, files: Files) -> Files:
    return _with_image(files, "jpg", jpeg(scene.image.convert("CMYK")))


def _with_image(files: Files, extension: str, data: bytes) -> Files:
    return {name: held for name, held in files.items() if name not in ("jpg", "png")} | {extension: data}


BROKEN = [
    Damage("a JPEG that is cut off in the middle", "image", _cut_off),
    Damage("an image file of zero bytes", "image", _empty),
    Damage("a web page named .jpg", "image", _web_page),
    Damage("a caption that is not UTF-8", "text", _latin_1),
    Damage("a file of unknown kind and nothing else", "image", _unknown),
    Damage("a PNG that claims 40,000 by 40,000 pixels", "image", _bomb),
]
ODD = [
    Damage("a JPEG lying on its side, with the EXIF tag that says so", None, _on_its_side),
    Damage("a JPEG in CMYK", None, _for_print),
]
