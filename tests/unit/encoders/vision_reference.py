"""Image backbones of transformers and timm used as their manuals show, one image at a time."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
import transformers
from timm.data import create_transform, resolve_model_data_config
from transformers.image_transforms import convert_to_rgb

from tests.unit.encoders.reference import opened

Represent = Callable[[Any], torch.Tensor]


def first(output: Any) -> torch.Tensor:
    return output.last_hidden_state[0, 0]


def pooler(output: Any) -> torch.Tensor:
    return output.pooler_output[0].flatten()


def map_mean(output: Any) -> torch.Tensor:
    return output.last_hidden_state[0].mean((1, 2))


def last_map_mean(output: Any) -> torch.Tensor:
    return output.hidden_states[-1][0].mean((1, 2))


class Backbone:
    """With the classes that transformers' manual names. represent: what is taken of the output of one image."""

    def __init__(self, folder: Path, represent: Represent) -> None:
        self.processor = transformers.AutoImageProcessor.from_pretrained(folder, backend="pil")
        self.model = transformers.AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
        self.represent = represent

    @torch.no_grad()
    def image(self, data: bytes) -> np.ndarray:
        inputs = self.processor(images=convert_to_rgb(opened(data)), return_tensors="pt")
        return self.represent(self.model(**inputs, output_hidden_states=True)).numpy()


class TimmReference:
    """As timm's manual has it."""

    def __init__(self, folder: Path, **options: Any) -> None:
        self.model = timm.create_model(f"local-dir:{folder}", pretrained=True, num_classes=0, **options).eval()
        self.transform = create_transform(**resolve_model_data_config(self.model), is_training=False)

    @torch.no_grad()
    def image(self, data: bytes) -> np.ndarray:
        return self.model(self.transform(opened(data).convert("RGB"))[None])[0].numpy()
