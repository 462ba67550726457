"""Small image-only checkpoints of transformers, with random weights whose outputs spread."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

from tests.checkpoints import SIDE, redraw, some_images

_WIDTH = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": SIDE}
_VIT = {**_WIDTH, "intermediate_size": 64}
_STAGES = {"hidden_sizes": [16, 32], "depths": [1, 1], "num_stages": 2}
_IMAGENET = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
_SQUARE = {"size": {"height": SIDE, "width": SIDE}}


@dataclass(frozen=True)
class VisionKind:
    """A class of transformers, its configuration and an image processor."""

    cls: str
    config: dict[str, Any]
    processor: Callable[[], Any]

    def build(self) -> Any:
        cls = getattr(transformers, self.cls)
        return cls(cls.config_class(**self.config)).eval()


def _vit_processor(**more: Any) -> Any:
    return transformers.ViTImageProcessorPil(**{**_SQUARE, **more})


def _dino_processor() -> Any:
    """Sizes as DINOv2's 256 and 224, in which the crop has an odd margin here."""
    return transformers.BitImageProcessorPil(
        size={"shortest_edge": SIDE + 9}, crop_size={"height": SIDE, "width": SIDE}, **_IMAGENET
    )


def _efficientnet_processor(**more: Any) -> Any:
    return transformers.EfficientNetImageProcessorPil(**{**_SQUARE, "resample": 0, **_IMAGENET, **more})


def _convnext_processor(side: int = SIDE) -> Any:
    return transformers.ConvNextImageProcessorPil(size={"shortest_edge": side}, crop_pct=0.875, **_IMAGENET)


_EFFICIENTNET = {"width_coefficient": 0.25, "depth_coefficient": 0.1, "hidden_dim": 320, "image_size": SIDE}
_SWIN = {"embed_dim": 16, "depths": [1, 1], "num_heads": [2, 2], "window_size": 4, "image_size": SIDE}
_HIERA = {
    "embed_dim": 16, "image_size": [SIDE, SIDE], "depths": [1, 1, 1], "num_heads": [1, 1, 2], "mlp_ratio": 2.0,
    "num_query_pool": 2,
}  # fmt: skip

VISION_KINDS = {
    "vit": VisionKind("ViTModel", _VIT, _vit_processor),
    "vit-classifier": VisionKind("ViTForImageClassification", _VIT, _vit_processor),
    "vit-masked": VisionKind("ViTForMaskedImageModeling", _VIT, _vit_processor),
    "deit": VisionKind(
        "DeiTForImageClassificationWithTeacher",
        _VIT,
        lambda: transformers.DeiTImageProcessorPil(
            size={"height": 75, "width": 75}, crop_size={"height": SIDE, "width": SIDE}
        ),
    ),
    "dinov2": VisionKind("Dinov2Model", {**_WIDTH, "patch_size": 16}, _dino_processor),
    "dinov2-registers": VisionKind("Dinov2WithRegistersModel", {**_WIDTH, "patch_size": 16}, _dino_processor),
    "dinov3": VisionKind(
        "DINOv3ViTModel",
        {**_VIT, "num_register_tokens": 4, "patch_size": 16},
        lambda: transformers.DINOv3ViTImageProcessor(**_SQUARE),
    ),
    "dinov3-convnext": VisionKind(
        "DINOv3ConvNextModel",
        {"hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 1, 1]},
        lambda: transformers.DINOv3ViTImageProcessor(**_SQUARE),
    ),
    "beit": VisionKind(
        "BeitForImageClassification",
        {**_VIT, "patch_size": 16, "use_mean_pooling": True},
        lambda: transformers.BeitImageProcessorPil(**_SQUARE),
    ),
    "siglip": VisionKind(
        "SiglipVisionModel", {**_VIT, "patch_size": 16}, lambda: transformers.SiglipImageProcessorPil(**_SQUARE)
    ),
    "efficientnet": VisionKind("EfficientNetModel", _EFFICIENTNET, _efficientnet_processor),
    "efficientnet-classifier": VisionKind(
        "EfficientNetForImageClassification",
        _EFFICIENTNET,
        lambda: _efficientnet_processor(include_top=False, rescale_offset=True, rescale_factor=1 / 127.5),
    ),
    "convnext": VisionKind("ConvNextModel", {**_STAGES, "patch_size": 4}, _convnext_processor),
    "convnext-squash": VisionKind(
        "ConvNextV2ForImageClassification", {**_STAGES, "patch_size": 16}, lambda: _convnext_processor(384)
    ),
    "swin": VisionKind("SwinForImageClassification", _SWIN, _vit_processor),
    "swinv2": VisionKind("Swinv2Model", _SWIN, _vit_processor),
    "hiera": VisionKind("HieraModel", _HIERA, _dino_processor),
    "focalnet": VisionKind(
        "FocalNetModel",
        {"embed_dim": 16, "depths": [1, 1], "focal_levels": [1, 1], "focal_windows": [3, 3], "image_size": SIDE},
        _dino_processor,
    ),
    "resnet": VisionKind(
        "ResNetForImageClassification",
        {"embedding_size": 16, "hidden_sizes": [16, 32], "depths": [1, 1], "layer_type": "basic"},
        _convnext_processor,
    ),
    "regnet": VisionKind(
        "RegNetModel",
        {"embedding_size": 16, "hidden_sizes": [16, 32], "depths": [1, 1], "groups_width": 8},
        _convnext_processor,
    ),
    "mobilenet-v1": VisionKind(
        "MobileNetV1ForImageClassification",
        {"depth_multiplier": 0.25},
        lambda: transformers.MobileNetV1ImageProcessorPil(
            size={"shortest_edge": 73}, crop_size={"height": SIDE, "width": SIDE}
        ),
    ),
}


def save_vision(folder: Path, kind: str) -> Path:
    """A folder for `hf:`, as `save_pretrained` lays it out; kind: one of VISION_KINDS."""
    model = VISION_KINDS[kind].build()
    images = smooth_and_rough(384 if kind == "convnext-squash" else SIDE)
    backbone = model if VISION_KINDS[kind].cls.endswith("Model") else model.base_model
    redraw(model, lambda: [_calibrated(backbone, images)])
    model.save_pretrained(folder)
    VISION_KINDS[kind].processor().save_pretrained(folder)
    return folder


def smooth_and_rough(side: int) -> torch.Tensor:
    """Batch norms that have seen smooth images alone blow up the edges of others."""
    rough = torch.randn(8, 3, side, side, generator=torch.Generator().manual_seed(3)).sign()
    return torch.cat([some_images(8, side), rough])


def _calibrated(model: Any, images: torch.Tensor) -> torch.Tensor:
    """A pooled output, in eval mode, once batch norms have seen the images."""
    calibrate(model, lambda: model(pixel_values=images))
    output = model(pixel_values=images)
    pooled = getattr(output, "pooler_output", None)
    return output.last_hidden_state[:, 0] if pooled is None else pooled.flatten(1)


def calibrate(model: nn.Module, forward: Callable[[], Any]) -> None:
    """Sets what batch norms have running: drawn anew, they have statistics of other weights and flatten all."""
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None
        norm.train()
    if norms:
        forward()
    model.eval()
