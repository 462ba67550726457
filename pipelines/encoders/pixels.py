"""One image to the uint8 pixels an encoder sees, with PIL alone, equal to what its reference library computes.

open_clip resizes and crops in the image's own mode and converts to RGB last; transformers (its `pil` backend) and
timm convert first. Libraries also round crop offsets differently.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pipelines.encoders.base import ImageTransform

_ORIENTATION_TAG = 0x0112
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_WHITE = (255, 255, 255, 255)
_STRIP_PIXELS = 2**20


def to_pixels(image: Image.Image, transform: ImageTransform, max_aspect: float) -> NDArray[np.uint8]:
    """uint8 [height, width, 3] at the encoder's size, before rescaling and normalising."""
    return pixels_of(prepared(image, max_aspect), transform)


def prepared(image: Image.Image, max_aspect: float) -> Image.Image:
    """What all encoders start from: EXIF orientation applied, 16-bit and float images scaled to 8 bits, and an image
    longer than `max_aspect` times its shorter side cropped to its centre of that aspect."""
    # One step a line: what a step was made from is freed before the next, for images of hundreds of MiB.
    image = _upright(image)
    image = _eight_bit(image)
    return _limit_aspect(image, max_aspect)


def pixels_of(image: Image.Image, transform: ImageTransform) -> NDArray[np.uint8]:
    """uint8 [height, width, 3] from a prepared image; [height, width, 6] of `tensors`."""
    if transform.rgb == "first" or transform.alpha == "white":
        image = _to_rgb(image, transform.alpha)
    if transform.library == "tensors":
        return _fine_pixels(image, transform)
    image = _resize(image, transform)
    image = _crop(image, transform)
    return np.array(image.convert("RGB"))


def _fine_pixels(image: Image.Image, transform: ImageTransform) -> NDArray[np.uint8]:
    """Whole values and their 256ths, of channels resized as floats, by a filter that does not overshoot."""
    resized = [np.asarray(_resize(image.getchannel(channel).convert("F"), transform)) for channel in "RGB"]
    values = np.rint(np.stack(resized, axis=-1) * 256).astype(np.uint16)
    parts: NDArray[np.uint8] = np.concatenate([values >> 8, values & 255], axis=-1).astype(np.uint8)
    return parts


def upright_size(image: Image.Image) -> tuple[int, int]:
    """(width, height) of a loaded image once its EXIF orientation is applied."""
    width, height = image.size
    return (height, width) if _orientation(image) >= 5 else (width, height)


def _orientation(image: Image.Image) -> int:
    """1 to 8; a broken EXIF block says nothing, and the image is taken as it is."""
    with suppress(Exception):
        value = image.getexif().get(_ORIENTATION_TAG)
        if value in _UPRIGHT:
            return int(value)
    return 1


def _upright(image: Image.Image) -> Image.Image:
    image.load()  # TIFF turns itself here and drops the tag
    method = _UPRIGHT.get(_orientation(image))
    return image if method is None else image.transpose(method)


def _eight_bit(image: Image.Image) -> Image.Image:
    """PIL's own conversion would clip 16-bit and float images to white."""
    if image.mode.startswith("I"):
        return _in_strips(image, "L", lambda strip: Image.fromarray(_eight_bit_integers(np.asarray(strip))))
    if image.mode == "F":
        scale = _scale_of_floats(image)
        return _in_strips(image, "L", lambda strip: Image.fromarray(_eight_bit_floats(_floats(strip), scale)))
    return image


def _in_strips(image: Image.Image, mode: str, convert: Callable[[Image.Image], Image.Image]) -> Image.Image:
    """What `convert` makes of each pixel, a strip at a time: steps between are of strips, not of whole images."""
    converted = Image.new(mode, image.size)
    for strip, top in _strips(image):
        converted.paste(convert(strip), (0, top))
    return converted


def _strips(image: Image.Image) -> Iterator[tuple[Image.Image, int]]:
    rows = max(1, _STRIP_PIXELS // image.width)
    for top in range(0, image.height, rows):
        yield image.crop((0, top, image.width, min(top + rows, image.height))), top


def _eight_bit_integers(values: NDArray[Any]) -> NDArray[np.uint8]:
    return np.clip(values >> 8, 0, 255).astype(np.uint8)


def _floats(image: Image.Image) -> NDArray[np.floating[Any]]:
    return np.nan_to_num(np.asarray(image))


def _scale_of_floats(image: Image.Image) -> float:
    """By the range the values are in: [0, 1], [0, 255] or that of 16 bits."""
    peak = max(float(_floats(strip).max()) for strip, _ in _strips(image))
    return 255.0 if peak <= 1 else 1.0 if peak <= 255 else 1 / 256


def _eight_bit_floats(values: NDArray[np.floating[Any]], scale: float) -> NDArray[np.uint8]:
    with np.errstate(over="ignore"):  # the largest floats, and what stands for infinity
        return np.clip(values * scale, 0, 255).astype(np.uint8)


def _limit_aspect(image: Image.Image, max_aspect: float) -> Image.Image:
    width, height = image.size
    short, long = sorted((width, height))
    if long <= max_aspect * short:
        return image
    keep = int(max_aspect * short)
    keep = max(keep - (long - keep) % 2, 1)  # of the same parity, so that the centre stays where it is
    start = (long - keep) // 2
    box = (start, 0, start + keep, height) if width > height else (0, start, width, start + keep)
    return image.crop(box)


def _to_rgb(image: Image.Image, alpha: str) -> Image.Image:
    transparent = "A" in image.getbands() or image.info.get("transparency") is not None
    if transparent and alpha != "drop":
        return _in_strips(image, "RGB", _on_white)
    return image if image.mode == "RGB" else image.convert("RGB")


def _on_white(image: Image.Image) -> Image.Image:
    image = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, _WHITE), image).convert("RGB")


def _resize(image: Image.Image, transform: ImageTransform) -> Image.Image:
    height, width = _resized(image.height, image.width, transform)
    if (width, height) == image.size:
        return image
    return image.resize((width, height), Image.Resampling[transform.resample.upper()])


def _resized(height: int, width: int, transform: ImageTransform) -> tuple[int, int]:
    target_height, target_width = transform.size
    if transform.resize == "squash":
        return transform.size
    if transform.resize == "patches":
        assert transform.patch is not None and transform.max_patches is not None
        return patch_grid_size(height, width, transform.patch, transform.max_patches)
    if transform.resize == "shortest" and target_height == target_width:
        long = int(target_height * max(height, width) / min(height, width))
        return (long, target_width) if width <= height else (target_height, long)
    ratios = (height / target_height, width / target_width)
    ratio = max(ratios) if transform.resize == "longest" else min(ratios)
    return max(1, round(height / ratio)), max(1, round(width / ratio))


def patch_grid_size(height: int, width: int, patch: int, max_patches: int) -> tuple[int, int]:
    """The largest (height, width) in whole patches, at most `max_patches` of them, of about the image's aspect.

    The bisection, its bounds and its stop are transformers' `get_image_size_for_max_num_patches`.
    """

    def scaled(scale: float, side: int) -> int:
        return max(patch, math.ceil(side * scale / patch) * patch)

    stop = 1e-5
    low, high = stop / 10, 100.0
    while high - low >= stop:
        scale = (low + high) / 2
        if (scaled(scale, height) / patch) * (scaled(scale, width) / patch) <= max_patches:
            low = scale
        else:
            high = scale
    return scaled(low, height), scaled(low, width)


def _crop(image: Image.Image, transform: ImageTransform) -> Image.Image:
    """The centre, padded with `fill` where the image is smaller."""
    if transform.crop is None:
        return image
    height, width = transform.crop
    offset = _offset_transformers if transform.library == "transformers" else _offset_torchvision
    left, top = offset(image.width, width), offset(image.height, height)
    cropped = image.crop((left, top, left + width, top + height))
    if transform.fill and (image.width < width or image.height < height):
        fill = transform.fill if isinstance(transform.fill, tuple) else (transform.fill,) * len(image.getbands())
        cropped.paste(fill, (0, 0, width, height))
        cropped.paste(image, (-left, -top))
    return cropped


def _offset_transformers(size: int, target: int) -> int:
    return (size - target) // 2


def _offset_torchvision(size: int, target: int) -> int:
    return round((size - target) / 2) if size >= target else -((target - size) // 2)
