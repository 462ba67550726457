"""BEiT-3's recipe written out naively, one item at a time."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import sentencepiece
import torch
from torchvision import transforms

from tests.checkpoints import SIDE
from tests.checkpoints_beit3 import HEADS
from tests.unit.encoders.reference import opened

State = dict[str, torch.Tensor]


def state_of(path: Path) -> State:
    return torch.load(path, weights_only=False)["model"]


def norm(x: torch.Tensor, state: State, key: str) -> torch.Tensor:
    mean, variance = x.mean(-1, keepdim=True), x.var(-1, unbiased=False, keepdim=True)
    return (x - mean) / torch.sqrt(variance + 1e-5) * state[f"{key}.weight"] + state[f"{key}.bias"]


def linear(x: torch.Tensor, state: State, key: str) -> torch.Tensor:
    return x @ state[f"{key}.weight"].T + state[f"{key}.bias"]


def naive_encoder(x: torch.Tensor, state: State, branch: str) -> torch.Tensor:
    """[length, dim] from embedded tokens of one item."""
    length, dim = x.shape
    x = x + state[f"beit3.encoder.embed_positions.{branch}.weight"][2 : 2 + length]
    layer = 0
    while f"beit3.encoder.layers.{layer}.self_attn_layer_norm.{branch}.weight" in state:
        at = f"beit3.encoder.layers.{layer}"
        normed = norm(x, state, f"{at}.self_attn_layer_norm.{branch}")
        q, k, v = (linear(normed, state, f"{at}.self_attn.{each}_proj.{branch}") for each in "qkv")
        width = dim // HEADS
        seen = []
        for head in range(HEADS):
            part = slice(head * width, (head + 1) * width)
            scores = (q[:, part] * width**-0.5) @ k[:, part].T
            seen.append(torch.softmax(scores, -1) @ v[:, part])
        attended = norm(torch.cat(seen, -1), state, f"{at}.self_attn.inner_attn_ln.{branch}")
        x = x + linear(attended, state, f"{at}.self_attn.out_proj.{branch}")
        hidden = linear(norm(x, state, f"{at}.final_layer_norm.{branch}"), state, f"{at}.ffn.{branch}.fc1")
        hidden = hidden * 0.5 * (1 + torch.erf(hidden / 2**0.5))
        x = x + linear(norm(hidden, state, f"{at}.ffn.{branch}.ffn_layernorm"), state, f"{at}.ffn.{branch}.fc2")
        layer += 1
    return norm(x, state, f"beit3.encoder.layer_norm.{branch}")


def preprocess(data: bytes, side: int) -> torch.Tensor:
    bicubic = transforms.InterpolationMode.BICUBIC
    steps = [transforms.Resize((side, side), bicubic), transforms.ToTensor(), transforms.Normalize(0.5, 0.5)]
    return transforms.Compose(steps)(opened(data).convert("RGB"))


def naive_image(data: bytes, state: State, side: int = SIDE) -> np.ndarray:
    pixels = preprocess(data, side)
    kernel, bias = state["beit3.vision_embed.proj.weight"], state["beit3.vision_embed.proj.bias"]
    patch = kernel.shape[-1]
    tokens = [state["beit3.vision_embed.cls_token"][0, 0]]
    for row in range(0, side, patch):
        for column in range(0, side, patch):
            tile = pixels[:, row : row + patch, column : column + patch]
            tokens.append((kernel * tile).sum((1, 2, 3)) + bias)
    first = naive_encoder(torch.stack(tokens), state, "A")[0]
    return (state["vision_head.weight"] @ first).numpy()


def naive_ids(caption: str, spm: Path) -> list[int]:
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(spm)).encode(caption)
    return [0, *(piece + 1 if piece else 3 for piece in pieces[:62]), 2]


def naive_text(caption: str, state: State, spm: Path) -> np.ndarray:
    tokens = torch.stack([state["beit3.text_embed.weight"][index] for index in naive_ids(caption, spm)])
    return (state["language_head.weight"] @ naive_encoder(tokens, state, "B")[0]).numpy()


class Beit3Reference:
    def __init__(self, path: Path) -> None:
        self.state, self.spm = state_of(path), path.with_name("beit3.spm")

    def image(self, data: bytes) -> np.ndarray:
        return naive_image(data, self.state)

    def text(self, caption: str) -> np.ndarray:
        return naive_text(caption, self.state, self.spm)
