"""Image processors of transformers as ImageTransforms: those of the `pil` backend, as the models were released with.

DINOv3's has none. It resizes tensors of floats, which PIL does as well, to a ten millionth.
"""

from __future__ import annotations

from math import isqrt
from pathlib import Path
from typing import Any, Literal

import transformers
from PIL import Image
from transformers.image_processing_backends import PilBackend

from pipelines.encoders.base import ImageTransform
from pipelines.encoders.hf_text import from_files
from pipelines.errors import EncoderError

_Geometry = tuple[Literal["shortest", "squash", "patches"], tuple[int, int], tuple[int, int] | None]
_Triple = tuple[float, float, float]

# Those with steps of their own that are followed here, or that change label maps alone.
_KNOWN = (
    "BeitImageProcessorPil",
    "ConvNextImageProcessorPil",
    "DINOv3ViTImageProcessor",
    "EfficientNetImageProcessorPil",
    "Siglip2ImageProcessorPil",
)
# ConvNeXt's processor neither crops nor keeps the aspect from this size on.
_CONVNEXT_SQUASHED = 384


def image_transform(path: Path, name: str) -> ImageTransform:
    """From the checkpoint's own image processor. Raises: EncoderError where it does something else too."""
    processor = from_files(transformers.AutoImageProcessor, path, name, backend="pil")
    _refuse_unknown(processor, name)
    resize, size, crop = _geometry(processor, name)
    mean, std = _statistics(processor, name)
    patches = resize == "patches"
    return ImageTransform(
        resize=resize,
        size=size,
        crop=crop,
        resample=_resample(processor, name),
        alpha="white",
        rgb="first",
        library="tensors" if _on_tensors(processor) else "transformers",
        mean=mean,
        std=std,
        patch=int(processor.patch_size) if patches else None,
        max_patches=int(processor.max_num_patches) if patches else None,
    )


def _refuse_unknown(processor: Any, name: str) -> None:
    cls = type(processor)
    plain = issubclass(cls, PilBackend) and cls.resize is PilBackend.resize
    plain = plain and cls._preprocess is PilBackend._preprocess
    if not plain and cls.__name__ not in _KNOWN:
        raise EncoderError(
            f"{name}: what its {cls.__name__} does to images cannot be done with PIL alone in the same way.",
            "Use a checkpoint of another processor, as that of ViT or DINOv2.",
        )


def _on_tensors(processor: Any) -> bool:
    return type(processor).__name__ == "DINOv3ViTImageProcessor"


def _resample(processor: Any, name: str) -> str:
    resample = Image.Resampling(processor.resample).name.lower()
    if _on_tensors(processor) and resample != "bilinear":
        # Others overshoot, and what is below 0 or above 255 cannot travel as bytes.
        raise EncoderError(f"{name}: DINOv3's processor is known with bilinear filtering, not {resample}.", "")
    return resample


# -- sizes ---------------------------------------------------------------------------------------


def _geometry(processor: Any, name: str) -> _Geometry:
    if hasattr(processor, "max_num_patches"):
        side = int(processor.patch_size) * isqrt(int(processor.max_num_patches))
        return "patches", (side, side), None
    size, crop = processor.size, processor.crop_size if getattr(processor, "do_center_crop", False) else None
    cropped = (int(crop.height), int(crop.width)) if crop else None
    if processor.do_resize and getattr(size, "shortest_edge", None) and not getattr(size, "longest_edge", None):
        shortest = int(size.shortest_edge)
        if hasattr(processor, "crop_pct"):
            return _convnext_geometry(shortest, processor.crop_pct)
        return "shortest", (shortest, shortest), cropped
    if processor.do_resize and getattr(size, "height", None) and getattr(size, "width", None):
        return "squash", (int(size.height), int(size.width)), cropped
    raise EncoderError(f"{name}: an image processor of size {size} is not known.", "Use a CLIP or SigLIP checkpoint.")


def _convnext_geometry(side: int, crop_pct: float) -> _Geometry:
    if side >= _CONVNEXT_SQUASHED:
        return "squash", (side, side), None
    return "shortest", (int(side / crop_pct),) * 2, (side, side)


# -- means ---------------------------------------------------------------------------------------


def _statistics(processor: Any, name: str) -> tuple[_Triple, _Triple]:
    """mean and std of values in [0, 1], with all that the processor does to values folded into them."""
    efficientnet = hasattr(processor, "include_top")
    plain = processor.do_rescale and processor.do_normalize and not getattr(processor, "do_pad", False)
    if not plain or not (efficientnet or abs(processor.rescale_factor * 255 - 1) <= 1e-6):
        raise EncoderError(f"{name}: its image processor pads, or does not rescale by 1/255 and normalise.", "")
    mean, std = tuple(processor.image_mean), tuple(processor.image_std)
    return _efficientnet_statistics(processor, mean, std) if efficientnet else (mean, std)


def _efficientnet_statistics(processor: Any, mean: Any, std: Any) -> tuple[_Triple, _Triple]:
    """rescale_offset takes 1 off what was rescaled; include_top divides by std a second time."""
    scale = processor.rescale_factor * 255
    red, green, blue = ((each + bool(processor.rescale_offset)) / scale for each in mean)
    low, middle, high = (each ** (2 if processor.include_top else 1) / scale for each in std)
    return (red, green, blue), (low, middle, high)
