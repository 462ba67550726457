"""timm's evaluation transform as an ImageTransform."""

from __future__ import annotations

import math
from typing import Any

from pipelines.encoders.base import ImageTransform
from pipelines.errors import EncoderError

_RESAMPLE = ("nearest", "bilinear", "bicubic", "box", "hamming", "lanczos")


def image_transform(data: dict[str, Any], name: str) -> ImageTransform:
    """As `timm.data.create_transform(**data, is_training=False)` does it to an image in RGB.

    data: of `timm.data.resolve_model_data_config`. Raises: EncoderError.
    """
    channels, height, width = data["input_size"]
    if channels != 3 or data["interpolation"] not in _RESAMPLE:
        told = f"{channels} channels and {data['interpolation']} filtering"
        raise EncoderError(f"{name}: images of {told} are not known.", "Use a model of RGB images.")
    mode, mean = data["crop_mode"], tuple(data["mean"])
    return ImageTransform(
        resize={"squash": "squash", "border": "longest"}.get(mode, "shortest"),  # type: ignore[arg-type]
        size=(math.floor(height / data["crop_pct"]), math.floor(width / data["crop_pct"])),
        crop=(height, width),
        resample=data["interpolation"],
        alpha="drop",
        rgb="first",
        library="torchvision",
        mean=mean,
        std=tuple(data["std"]),
        fill=tuple(round(255 * value) for value in mean) if mode == "border" else 0,
    )
