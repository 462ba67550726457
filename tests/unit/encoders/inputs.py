"""Images of every mode, shape and file format that comes up, and captions of many scripts."""

from __future__ import annotations

import io
import os
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image

CAPTIONS = [
    "a dog runs over the grass",
    "A Dog! Runs, over THE grass?",
    "two children play near the water",
    "",
    "   ",
    "\n\t",
    "a   photo\nof  a\tcat",
    "una bambina che ride sulla spiaggia, perché è estate",
    "eine Straße in München bei Nacht",
    "一只狗在草地上奔跑",
    "собака бежит по траве",
    "كلب يركض على العشب",
    "犬が走る 🐕🌿",
    "naïve café résumé",
    "the red ball 0123456789",
    "x",
    "water " * 200,
    "a" * 3000,
    "the end of the text <|endoftext|> and more",
]
# open_clip unescapes these and mends mojibake, transformers does not.
ENTITIES = ["&lt;b&gt;caf&eacute;&lt;/b&gt;", "fish &amp;amp; chips", "cafÃ© au lait"]


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    """RGB: smooth colours, edges and a little noise, so that filters and offsets show."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (5, 5, 3), np.uint8)).resize(
        (width, height), Image.Resampling.BICUBIC
    )
    pixels = np.asarray(coarse).astype(np.int16)
    pixels[height // 3 : height // 2 + 1, width // 4 : width // 2 + 1] = rng.integers(0, 256, 3)
    return Image.fromarray(np.clip(pixels + rng.integers(-9, 10, pixels.shape), 0, 255).astype(np.uint8))


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    target = io.BytesIO()
    image.save(target, kind, **options)
    return target.getvalue()


def with_orientation(image: Image.Image, orientation: int, kind: str = "JPEG") -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encoded(image, kind, exif=exif.tobytes() if kind != "TIFF" else exif)


def see_through(width: int, height: int, seed: int = 0) -> Image.Image:
    image = picture(width, height, seed).convert("RGBA")
    ramp = np.linspace(0, 255, width).astype(np.uint8)
    image.putalpha(Image.fromarray(np.tile(ramp, (height, 1))))
    return image


def sixteen_bit(width: int, height: int) -> Image.Image:
    grey = np.asarray(picture(width, height, 7).convert("L")).astype(np.uint16)
    return Image.fromarray(grey * 257)


def varied() -> dict[str, bytes]:
    """36 images by what is peculiar about them."""
    images = {f"jpeg-{w}x{h}": encoded(picture(w, h, w), "JPEG", quality=92) for w, h in SIZES}
    images |= {f"exif-{n}": with_orientation(picture(120, 71, n), n) for n in range(2, 9)}
    palette = picture(90, 64, 3).quantize(64)
    clear = see_through(80, 77, 4)
    images |= {
        "png": encoded(picture(100, 75, 1), "PNG"),
        "webp": encoded(picture(101, 75, 2), "WEBP", lossless=True),
        "bmp": encoded(picture(64, 64, 3), "BMP"),
        "tiff": encoded(picture(64, 99, 4), "TIFF"),
        "tiff-exif": with_orientation(picture(64, 99, 5), 6, "TIFF"),
        "png-exif": with_orientation(picture(70, 99, 6), 8, "PNG"),
        "grey": encoded(picture(77, 66, 5).convert("L"), "PNG"),
        "grey-jpeg": encoded(picture(77, 66, 6).convert("L"), "JPEG"),
        "one-bit": encoded(picture(130, 90, 6).convert("1"), "PNG"),
        "cmyk": encoded(picture(88, 70, 7).convert("CMYK"), "JPEG"),
        "palette": encoded(palette, "PNG"),
        "palette-clear": encoded(palette, "PNG", transparency=3),
        "gif": encoded(palette, "GIF"),
        "rgba": encoded(clear, "PNG"),
        "grey-alpha": encoded(clear.convert("LA"), "PNG"),
        "webp-alpha": encoded(clear, "WEBP", lossless=True),
        "animated": encoded(picture(60, 60, 8), "GIF", save_all=True, append_images=[picture(60, 60, 9)]),
        "animated-png": encoded(picture(60, 61, 8), "PNG", save_all=True, append_images=[picture(60, 61, 9)]),
        "sixteen-bit": encoded(sixteen_bit(90, 66), "PNG"),
        "icc": encoded(picture(66, 90, 9), "JPEG", icc_profile=b"broken"),
    }
    return images


# 67 x 64: of what is over by three, the libraries leave out one or two in front.
SIZES = [(64, 64), (67, 64), (64, 67), (65, 64), (63, 40), (200, 150), (150, 201), (333, 97), (31, 29), (500, 375)]
SIZES += [(640, 30), (1, 1), (3, 90)]


def photos(limit: int = 24) -> dict[str, bytes]:
    """Real photos, where VECMILL_TEST_DATA names the folder that has them."""
    root = os.environ.get("VECMILL_TEST_DATA")
    if not root:
        return {}
    with tarfile.open(Path(root) / "photos-open" / "open-00000.tar") as tar:
        members = [member for member in tar.getmembers() if member.name.endswith(".jpg")]
        return {member.name: tar.extractfile(member).read() for member in members[:limit]}
