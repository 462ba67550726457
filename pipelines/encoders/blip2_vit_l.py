"""The vision tower of LAVIS's BLIP-2 `pretrain_vitL`: CLIP's ViT-L without its last layer, norm and projection.

Names as in OpenAI's checkpoints. https://github.com/salesforce/LAVIS, lavis/models/clip_vit.py
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import torch
from torch import nn
from transformers import Blip2ForImageTextRetrieval


class Blip2VitL(Blip2ForImageTextRetrieval):  # type: ignore[no-untyped-call]
    """transformers' BLIP-2 for retrieval upon that tower."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.vision_model = VisionTower(config.vision_config)


class VisionTower(nn.Module):
    """config: a Blip2VisionConfig, of which the sizes are read."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        width, patches = config.hidden_size, (config.image_size // config.patch_size) ** 2
        self.conv1 = nn.Conv2d(3, width, config.patch_size, config.patch_size, bias=False)
        self.class_embedding = nn.Parameter(torch.zeros(width))
        self.positional_embedding = nn.Parameter(torch.zeros(patches + 1, width))
        self.ln_pre = nn.LayerNorm(width)
        blocks = [_Block(width, config.num_attention_heads) for _ in range(config.num_hidden_layers)]
        self.transformer = nn.Sequential(OrderedDict(resblocks=nn.Sequential(*blocks)))
        self.ln_vision = nn.LayerNorm(width)

    def forward(self, pixel_values: torch.Tensor) -> tuple[torch.Tensor]:
        """([n, 1 + patches, width],), the class first, from pixels [n, 3, height, width]."""
        patches = self.conv1(pixel_values).flatten(2).transpose(1, 2)
        first = self.class_embedding.expand(len(patches), 1, -1)
        tokens = torch.cat([first, patches], 1) + self.positional_embedding
        return (self.ln_vision(self.transformer(self.ln_pre(tokens))),)


class _Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = nn.MultiheadAttention(width, heads, batch_first=True)
        wide = nn.Linear(width, 4 * width)
        self.mlp = nn.Sequential(OrderedDict(c_fc=wide, gelu=_QuickGELU(), c_proj=nn.Linear(4 * width, width)))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        normed = self.ln_1(tokens)
        tokens = tokens + self.attn(normed, normed, normed, need_weights=False)[0]
        return tokens + self.mlp(self.ln_2(tokens))  # type: ignore[no-any-return]


class _QuickGELU(nn.Module):
    def forward(self, values: torch.Tensor) -> torch.Tensor:
        return values * torch.sigmoid(1.702 * values)
