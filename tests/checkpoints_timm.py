"""Small checkpoints of timm, with random weights whose outputs spread."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import timm
import torch
from timm.models import save_for_hf

from tests.checkpoints import redraw
from tests.checkpoints_vision import calibrate, smooth_and_rough

_TINY = {"embed_dim": 32, "depth": 2, "num_heads": 2, "patch_size": 16}
_SIDE = {"input_size": (3, 64, 64)}

TIMM_KINDS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "vit": ("vit_tiny_patch16_224", _TINY, _SIDE),
    "vit-map": ("test_vit3", {}, {**_SIDE, "interpolation": "bilinear"}),
    "eva": ("eva02_tiny_patch14_224", {**_TINY, "img_size": 64}, {**_SIDE, "crop_pct": 1.0}),
    "dinov2": ("vit_small_patch14_reg4_dinov2", _TINY, {**_SIDE, "crop_mode": "squash"}),
    "mobilenetv3": ("mobilenetv3_small_050", {}, {**_SIDE, "crop_pct": 0.875}),
    "resnet": ("test_resnet", {}, {**_SIDE, "crop_pct": 0.9, "interpolation": "bilinear"}),
    "mobilenetv1": ("mobilenetv1_100", {}, {**_SIDE, "crop_mode": "border", "crop_pct": 0.95}),
    "border": ("test_vit", {}, {**_SIDE, "crop_mode": "border", "crop_pct": 1.0, "mean": (0.5, 0.4, 0.3)}),
    "squash": ("test_convnext", {}, {**_SIDE, "crop_mode": "squash", "crop_pct": 0.8, "interpolation": "lanczos"}),
    "oblong": ("test_byobnet", {}, {"input_size": (3, 64, 96), "crop_pct": 0.9}),
}
"""Each an architecture, what it is built with, and how its images are prepared."""


def timm_model(kind: str) -> Any:
    """With a classifier of 10 classes, where the weights it was published with have one."""
    architecture, arguments, data = TIMM_KINDS[kind]
    published = timm.get_pretrained_cfg(architecture)
    classes = 10 if published is None or published.num_classes else 0
    model = timm.create_model(
        architecture, num_classes=classes, pretrained_cfg_overlay={**data, "num_classes": classes}, **arguments
    ).eval()
    height, width = model.pretrained_cfg["input_size"][1:]
    images = smooth_and_rough(max(height, width))[:, :, :height, :width]
    redraw(model, lambda: [_pooled(model, images)])
    return model


def _pooled(model: Any, images: torch.Tensor) -> torch.Tensor:
    """Behind the model's own pooling, once batch norms have seen the images."""
    calibrate(model, lambda: model.forward_features(images))
    pooled: torch.Tensor = model.forward_head(model.forward_features(images), pre_logits=True)
    return pooled


def save_timm(folder: Path, kind: str, safe: bool = True) -> Path:
    """A folder for `timm:local-dir:`, as timm pushes it to the hub; kind: one of TIMM_KINDS."""
    save_for_hf(timm_model(kind), str(folder), safe_serialization=safe)
    return folder
