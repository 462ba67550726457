"""The PIL transform on its own: extreme shapes, alpha, 16 bits, and sizes that are not square."""

from __future__ import annotations

import io
import tracemalloc
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image, ImageOps
from torchvision import transforms
from torchvision.transforms import InterpolationMode
from transformers.models.siglip2.image_processing_pil_siglip2 import get_image_size_for_max_num_patches

from pipelines.encoders.base import ImageTransform
from pipelines.encoders.pixels import patch_grid_size, to_pixels, upright_size
from tests.unit.encoders.inputs import picture, see_through, sixteen_bit, with_orientation

CLIP = ImageTransform(
    resize="shortest",
    size=(32, 32),
    crop=(32, 32),
    resample="bicubic",
    alpha="drop",
    rgb="last",
    library="torchvision",
    mean=(0.5, 0.5, 0.5),
    std=(0.5, 0.5, 0.5),
)
SQUASH = replace(CLIP, resize="squash", crop=None)


def test_shape_and_dtype() -> None:
    pixels = to_pixels(picture(70, 50), CLIP, 50)
    assert pixels.shape == (32, 32, 3)
    assert pixels.dtype == np.uint8
    assert pixels.flags.c_contiguous


@pytest.mark.parametrize("width, height", [(2000, 10), (10, 2000), (401, 4), (402, 4), (3, 999)])
def test_a_long_image_keeps_the_centre_of_the_reference(width: int, height: int) -> None:
    """Cropped before it is resized, the pixels are those of resizing it whole, but for rounding."""
    image = picture(width, height)
    whole = to_pixels(image, CLIP, 1e9).astype(int)
    cropped = to_pixels(image, CLIP, 20).astype(int)
    assert np.abs(whole - cropped).mean() < 2


@pytest.mark.parametrize("transform", [CLIP, SQUASH])
def test_a_ribbon_costs_no_memory(transform: ImageTransform) -> None:
    """1 x 60,000 would be 32 x 1,920,000 pixels before the crop: 184 MB."""
    tracemalloc.start()
    assert to_pixels(picture(60_000, 1), transform, 50).shape == (32, 32, 3)
    assert tracemalloc.get_traced_memory()[1] < 20 * 2**20
    tracemalloc.stop()


def test_squashing_a_ribbon_sees_its_centre_only() -> None:
    image = Image.new("RGB", (1000, 4), "red")
    image.paste("blue", (400, 0, 600, 4))
    assert (to_pixels(image, SQUASH, 50) == (0, 0, 255)).all()


@pytest.mark.parametrize("alpha, colour", [("white", 255), ("drop", 0)])
@pytest.mark.parametrize("library", ["torchvision", "transformers"])
def test_alpha_is_what_the_transform_says(alpha: str, colour: int, library: str) -> None:
    clear = Image.new("RGBA", (40, 40), (0, 0, 0, 0))
    transform = replace(CLIP, alpha=alpha, library=library)
    assert (to_pixels(clear, transform, 50) == colour).all()


def test_transparent_palette_on_white() -> None:
    image = picture(40, 40).quantize(8)
    target = io.BytesIO()
    image.save(target, "PNG", transparency=bytes(8))
    assert (to_pixels(Image.open(target), replace(CLIP, alpha="white"), 50) == 255).all()


def test_sixteen_bits_are_scaled_not_clipped() -> None:
    image = sixteen_bit(32, 32)
    eight = Image.fromarray((np.asarray(image) // 256).astype(np.uint8))
    np.testing.assert_array_equal(to_pixels(image, CLIP, 50), to_pixels(eight, CLIP, 50))
    assert to_pixels(image, CLIP, 50).mean() < 250
    np.testing.assert_array_equal(to_pixels(image.convert("I"), CLIP, 50), to_pixels(eight, CLIP, 50))


@pytest.mark.parametrize("scale", [1 / 255, 1, 256])
def test_floats_are_scaled_by_their_range(scale: float) -> None:
    grey = np.asarray(picture(32, 32).convert("L")).astype(np.float32)
    grey[0, 0] = 255
    pixels = to_pixels(Image.fromarray(grey * np.float32(scale)), CLIP, 50)
    assert np.abs(pixels[..., 0].astype(int) - grey).max() <= 1


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "I", "I;16", "F"])
def test_strips_of_a_large_image_make_the_whole(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    image = sixteen_bit(67, 45) if mode.startswith("I") else see_through(67, 45)
    image = image if mode == "I;16" else image.convert(mode)
    if mode == "P":
        image.info["transparency"] = 3
    white = replace(SQUASH, size=(45, 67), alpha="white")
    whole = to_pixels(image, white, 50)
    assert np.ptp(whole) > 50
    for pixels in (1, 200, 67 * 44):
        monkeypatch.setattr("pipelines.encoders.pixels._STRIP_PIXELS", pixels)
        assert np.array_equal(to_pixels(image, white, 50), whole)


def test_a_float_image_of_nothing_is_black() -> None:
    nothing = Image.fromarray(np.full((32, 32), np.nan, np.float32))
    assert (to_pixels(nothing, CLIP, 50) == 0).all()


@pytest.mark.parametrize("orientation", range(1, 9))
def test_upright_size_and_pixels(orientation: int) -> None:
    image = Image.open(io.BytesIO(with_orientation(picture(64, 40), orientation)))
    assert upright_size(image) == ((40, 64) if orientation >= 5 else (64, 40))
    np.testing.assert_array_equal(to_pixels(image, CLIP, 50), to_pixels(ImageOps.exif_transpose(image), CLIP, 50))


def test_broken_exif_is_ignored() -> None:
    target = io.BytesIO()
    picture(64, 40).save(target, "JPEG", exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xff\x01\x12")
    assert to_pixels(Image.open(target), CLIP, 50).shape == (32, 32, 3)


@pytest.mark.parametrize("mode", ["RGB", "L", "1", "P", "RGBA", "LA", "CMYK", "YCbCr", "HSV"])
@pytest.mark.parametrize("size", [(33, 77), (20, 20), (101, 64), (43, 32), (32, 45)])
def test_equals_torchvision_in_every_mode(mode: str, size: tuple[int, int]) -> None:
    image = see_through(*size).convert(mode) if mode in ("RGBA", "LA") else picture(*size).convert(mode)
    theirs = transforms.Compose(
        [
            transforms.Resize(32, InterpolationMode.BICUBIC),
            transforms.CenterCrop(40),
            transforms.Lambda(lambda image: np.array(image.convert("RGB"))),
        ]
    )
    np.testing.assert_array_equal(to_pixels(image, replace(CLIP, crop=(40, 40)), 50), theirs(image))


def test_sizes_of_patches_equal_transformers() -> None:
    for height, width in [(1, 1), (7, 900), (224, 224), (333, 97), (5000, 3), (1, 60_000), (1080, 1920)]:
        for patch, most in [(16, 256), (14, 729), (8, 24)]:
            theirs = get_image_size_for_max_num_patches(height, width, patch, most)
            assert patch_grid_size(height, width, patch, most) == theirs
