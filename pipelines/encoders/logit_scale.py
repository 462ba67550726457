"""What an encoder was trained to multiply its cosines by before a softmax over them."""

from __future__ import annotations

from typing import Any

import torch

from pipelines.encoders import registry
from pipelines.encoders.base import EncoderSpec


def logit_scale(spec: EncoderSpec) -> float | None:
    """exp(logit_scale), as CLIP and its like keep it beside their weights; None of an encoder that has none."""
    encoder: Any = registry.load(spec, torch.device("cpu"))
    for part in vars(getattr(encoder, "inner", encoder)).values():
        scale = getattr(part, "logit_scale", None) if isinstance(part, torch.nn.Module) else None
        if isinstance(scale, torch.Tensor) and scale.numel() == 1:
            return float(scale.float().exp())
    return None
