"""A CLIP in transformers' format with random weights, made with torch and transformers alone, no network."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from transformers.convert_slow_tokenizer import bytes_to_unicode

SPREAD = 0.25
SMALL = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
WORDS = ("a", "red", "dog", "runs", "over", "the", "green", "field", "towards", "two", "small", "boats")


def save_clip(folder: Path, small: bool) -> Path:
    """The size of ViT-B/32, or a small one, whose vectors spread by a quarter of their norm."""
    text, vision = (SMALL, {**SMALL, "image_size": 64, "patch_size": 16}) if small else ({}, {})
    tokenizer = clip_tokenizer(folder)
    config = transformers.CLIPConfig(
        text_config={**text, "bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id},
        vision_config=vision,
        projection_dim=64 if small else 512,
    )
    torch.manual_seed(0)
    model = transformers.CLIPModel(config).eval()
    side = config.vision_config.image_size
    tokens = tokenizer(captions(16), padding="max_length", return_tensors="pt")["input_ids"]
    images = torch.from_numpy(np.stack(pictures(16, side))).permute(0, 3, 1, 2) / 127.5 - 1
    _redraw(model, lambda: (model.get_image_features(images), model.get_text_features(tokens)))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    edges = {"size": {"shortest_edge": side}, "crop_size": {"height": side, "width": side}}
    transformers.CLIPImageProcessor(**edges).save_pretrained(folder)
    return folder


def _redraw(model: torch.nn.Module, outputs: Callable[[], tuple[Any, Any]]) -> None:
    """Draws the matrices ever wider: as initialised, a model gives nearly the same vector for every input."""
    for gain in (1.0, 1.5, 2.0, 3.0, 4.0):
        generator = torch.Generator().manual_seed(0)
        with torch.inference_mode():
            for parameter in (each for each in model.parameters() if each.dim() > 1):
                fan_in = parameter[0].numel()
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * gain / fan_in**0.5)
            if all(spread(output.pooler_output) > SPREAD for output in outputs()):
                return
    raise AssertionError("no draw spreads")


def spread(vectors: torch.Tensor) -> float:
    return float((vectors - vectors.mean(0)).norm(dim=1).mean() / vectors.norm(dim=1).mean())


def clip_tokenizer(folder: Path) -> Any:
    """CLIP's own tokenizer over single bytes, with the ids of its ends at the end, as in the real vocabulary."""
    alphabet = list(bytes_to_unicode().values())
    tokens = [*alphabet, *(f"{letter}</w>" for letter in alphabet), "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({token: at for at, token in enumerate(tokens)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return transformers.CLIPTokenizer.from_pretrained(folder, model_max_length=77)


def pictures(count: int, side: int) -> list[np.ndarray]:
    """uint8 [side, side, 3]: smooth and unlike each other."""
    coarse = torch.rand(count, 3, 4, 4, generator=torch.Generator().manual_seed(1))
    smooth = torch.nn.functional.interpolate(coarse, side, mode="bilinear") * 255
    return list(smooth.to(torch.uint8).permute(0, 2, 3, 1).contiguous().numpy())


def captions(count: int) -> list[str]:
    return [f"{row} {' '.join(WORDS[row % 5 :][: row % 11])}" for row in range(count)]
