"""The Multiway transformer of BEiT-3 with its retrieval heads: attention over one stream of tokens, all other weights
twice, `A` for image tokens and `B` for text tokens.

Names of modules are those of released checkpoints. https://arxiv.org/abs/2208.10442 (BEiT-3),
https://arxiv.org/abs/2210.06423 (the norms inside attention and feed-forward).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn
from torch.nn import functional

Branch = Literal["A", "B"]

# Of a table of positions: rows that fairseq, which the tables were made for, leaves unused.
UNUSED_POSITIONS = 2
# Of the table of image positions: those, and that of the class token; a grid of patches follows.
EXTRA_POSITIONS = UNUSED_POSITIONS + 1


@dataclass(frozen=True)
class Shape:
    """side: of the image in pixels. positions: rows of the table of text positions."""

    dim: int
    heads: int
    layers: int
    hidden: int
    vocabulary: int
    positions: int
    patch: int
    side: int

    @property
    def patches(self) -> int:
        return (self.side // self.patch) ** 2


def _twice(make: Callable[[], nn.Module]) -> nn.ModuleDict:
    return nn.ModuleDict({"A": make(), "B": make()})


class Attention(nn.Module):
    """Self-attention, its output normalised before it is projected."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.k_proj, self.v_proj, self.q_proj, self.out_proj = (_twice(lambda: nn.Linear(dim, dim)) for _ in range(4))
        self.inner_attn_ln = _twice(lambda: nn.LayerNorm(dim))

    def forward(self, x: torch.Tensor, branch: Branch, mask: torch.Tensor | None) -> torch.Tensor:
        """[n, length, dim] from the same; mask: bool [n, 1, 1, length], True where there is a token."""
        query, key, value = (self._split(each[branch](x)) for each in (self.q_proj, self.k_proj, self.v_proj))
        # Whatever the dtype, the softmax in it is one of fp32, as it is in the original.
        seen = functional.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        joined: torch.Tensor = self.out_proj[branch](self.inner_attn_ln[branch](seen.transpose(1, 2).flatten(2)))
        return joined

    def _split(self, x: torch.Tensor) -> torch.Tensor:
        return x.view(*x.shape[:2], self.heads, -1).transpose(1, 2)


class FeedForward(nn.Module):
    """Normalised between its two layers."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(dim, hidden), nn.Linear(hidden, dim)
        self.ffn_layernorm = nn.LayerNorm(hidden)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = functional.gelu(self.fc1(x).float()).to(x.dtype)
        projected: torch.Tensor = self.fc2(self.ffn_layernorm(hidden))
        return projected


class Layer(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.self_attn = Attention(shape.dim, shape.heads)
        self.self_attn_layer_norm = _twice(lambda: nn.LayerNorm(shape.dim))
        self.ffn = _twice(lambda: FeedForward(shape.dim, shape.hidden))
        self.final_layer_norm = _twice(lambda: nn.LayerNorm(shape.dim))

    def forward(self, x: torch.Tensor, branch: Branch, mask: torch.Tensor | None) -> torch.Tensor:
        x = x + self.self_attn(self.self_attn_layer_norm[branch](x), branch, mask)
        result: torch.Tensor = x + self.ffn[branch](self.final_layer_norm[branch](x))
        return result


class VisionEmbedding(nn.Module):
    """Patches as tokens, the class token before them. The mask token is of pre-training."""

    def __init__(self, dim: int, patch: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, dim, patch, patch)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.mask_token = nn.Parameter(torch.zeros(1, 1, dim))

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        patches = self.proj(pixels).flatten(2).transpose(1, 2)
        return torch.cat((self.cls_token.expand(len(patches), -1, -1), patches), dim=1)


class Encoder(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        rows = {"A": shape.patches + EXTRA_POSITIONS, "B": shape.positions}
        self.embed_positions = nn.ModuleDict({key: nn.Embedding(count, shape.dim) for key, count in rows.items()})
        self.layers = nn.ModuleList(Layer(shape) for _ in range(shape.layers))
        self.layer_norm = _twice(lambda: nn.LayerNorm(shape.dim))

    def forward(self, x: torch.Tensor, branch: Branch, mask: torch.Tensor | None = None) -> torch.Tensor:
        positions = torch.arange(UNUSED_POSITIONS, UNUSED_POSITIONS + x.shape[1], device=x.device)
        x = x + self.embed_positions[branch](positions)
        for layer in self.layers:
            x = layer(x, branch, mask)
        normed: torch.Tensor = self.layer_norm[branch](x)
        return normed


class Beit3(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.text_embed = nn.Embedding(shape.vocabulary, shape.dim)
        self.vision_embed = VisionEmbedding(shape.dim, shape.patch)
        self.encoder = Encoder(shape)


class Retrieval(nn.Module):
    """Vectors of images and of captions in one space. The scale of logits is of training."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.beit3 = Beit3(shape)
        self.vision_head = nn.Linear(shape.dim, shape.dim, bias=False)
        self.language_head = nn.Linear(shape.dim, shape.dim, bias=False)
        self.logit_scale = nn.Parameter(torch.zeros(()))

    def images(self, pixels: torch.Tensor) -> torch.Tensor:
        """[n, dim] from normalised pixels [n, 3, side, side]."""
        vectors: torch.Tensor = self.vision_head(self.beit3.encoder(self.beit3.vision_embed(pixels), "A")[:, 0])
        return vectors

    def texts(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """[n, dim] from int64 ids and mask [n, length], 1 where there is a token."""
        tokens = self.beit3.encoder(self.beit3.text_embed(ids), "B", mask.bool()[:, None, None])
        vectors: torch.Tensor = self.language_head(tokens[:, 0])
        return vectors
