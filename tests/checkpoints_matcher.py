"""Small matchers, with random weights whose outputs spread."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from pipelines.encoders.matcher_folder import CONFIG, WEIGHTS, MatcherConfig
from pipelines.encoders.matcher_model import Matcher
from pipelines.encoders.matcher_text import words_of
from tests.checkpoints import redraw, some_images, some_tokens
from tests.checkpoints_vision import calibrate, smooth_and_rough

SIGNS = ["<pad>", "<unk>", "<start>", "<end>"]
SPOKEN = (
    "a dog runs over the grass two children play near water una bambina che ride sulla spiaggia perché è estate in a "
    "of photo cat eine straße münchen red ball 0123456789 x naïve café 一只狗在草地上奔跑 собака бежит по траве and more end "
    "text its quick brown fox jumps person man woman on with white black blue standing sitting street young"
)
_VIT = {"embed_dim": 32, "depth": 2, "num_heads": 2, "patch_size": 16, "img_size": 64}

MATCHER_KINDS: dict[str, dict[str, Any]] = {
    "vit": {"image_tower": "vit_tiny_patch16_224", "image_arguments": _VIT, "image_size": (64, 64)},
    "mobilenetv1": {"image_tower": "mobilenetv1_100", "image_size": (96, 48), "mean": (0.4, 0.5, 0.6)},
}


def save_matcher(folder: Path, kind: str = "vit", signs: list[str] = SIGNS) -> Path:
    """A folder for `matcher:`; kind: one of MATCHER_KINDS. signs: that the vocabulary begins with."""
    words = [*signs, *dict.fromkeys(words_of(SPOKEN))]
    config = MatcherConfig(embed_dim=24, lstm_hidden=20, word_dim=16, max_words=12, **MATCHER_KINDS[kind])
    model = Matcher(config, len(words)).eval()
    height, width = config.image_size
    images = (smooth_and_rough if kind == "mobilenetv1" else some_images)(side=max(height, width))[
        :, :, :height, :width
    ]
    ids = some_tokens(len(words), 9)

    def outputs() -> list[torch.Tensor]:
        calibrate(model.image_tower, lambda: model.image_tower(images))
        with torch.no_grad():
            return [model.image(images), model.text(ids, torch.ones_like(ids))]

    redraw(model, outputs)
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: value.contiguous() for name, value in model.state_dict().items()}, folder / WEIGHTS)
    (folder / CONFIG).write_text(config.json())
    (folder / config.vocab).write_text("\n".join(words) + "\n")
    return folder
