"""Models of sentence-transformers: tokens' vectors of a transformer, pooled, and what comes behind."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn

from pipelines.encoders.hf_weights import load_strictly
from pipelines.errors import EncoderError

# What predicts from tokens' vectors, or pools them otherwise, decides none of ours; a checkpoint may have it or not.
_ASIDE = re.compile(r"(\w+\.)?pooler\.|cls\.|lm_head\.|vocab_(transform|layer_norm|projector)\.")


class SentenceModel(nn.Module):
    """Vectors of texts. layer: of tokens' vectors, -1 for the transformer's own last; truncate: to how many values."""

    def __init__(self, transformer: nn.Module, layer: int, steps: list[nn.Module], truncate: int | None) -> None:
        super().__init__()
        self.transformer, self.steps = transformer, nn.ModuleList(steps)
        self.layer, self.truncate = layer, truncate
        self.padding = getattr(transformer.config, "pad_token_id", None) or 0

    def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """float32 [n, dim] from int64 ids and mask [n, length], 1 where there is a token."""
        ids = ids.masked_fill(mask == 0, self.padding)
        found = self.transformer(input_ids=ids, attention_mask=mask, output_hidden_states=self.layer != -1)
        tokens = found.last_hidden_state if self.layer == -1 else found.hidden_states[self.layer]
        vectors: torch.Tensor = self.steps[0](tokens.float(), mask)
        for step in self.steps[1:]:
            vectors = step(vectors)
        return vectors[:, : self.truncate]


# -- pooling: float32 [n, dim] from tokens' [n, length, dim] and mask [n, length, 1] -------------------


def _first(tokens: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return tokens[:, 0]


def _last(tokens: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    at = mask.sum(1, keepdim=True).long().sub(1).clamp(min=0)
    return tokens.gather(1, at.expand(-1, -1, tokens.shape[2]))[:, 0]


def _max(tokens: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return tokens.masked_fill(mask == 0, -torch.inf).amax(1)


def _mean(tokens: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return (tokens * mask).sum(1) / mask.sum(1).clamp(min=1e-9)


def _mean_by_root(tokens: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return (tokens * mask).sum(1) / mask.sum(1).clamp(min=1e-9).sqrt()


def _mean_by_position(tokens: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Later tokens weigh more: https://arxiv.org/abs/2202.08904"""
    return _mean(tokens, mask * torch.arange(1, tokens.shape[1] + 1, device=tokens.device)[None, :, None])


_POOLS: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "cls": _first,
    "max": _max,
    "mean": _mean,
    "mean_sqrt_len_tokens": _mean_by_root,
    "weightedmean": _mean_by_position,
    "lasttoken": _last,
}


class Pooling(nn.Module):
    """One vector of a text's tokens; several ways of pooling lie side by side in it."""

    def __init__(self, pools: list[str]) -> None:
        super().__init__()
        self.pools = [_POOLS[pool] for pool in pools]

    def forward(self, tokens: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        weights = mask.unsqueeze(-1).to(tokens.dtype)
        return torch.cat([pool(tokens, weights) for pool in self.pools], dim=1)


# -- behind it -------------------------------------------------------------------------------------


class Dense(nn.Module):
    """A linear layer and an activation, in the dtype of its weights; float32 out."""

    def __init__(self, inputs: int, outputs: int, bias: bool, activation: str) -> None:
        super().__init__()
        self.linear = nn.Linear(inputs, outputs, bias)
        self.activation = getattr(nn, activation)()

    def forward(self, vectors: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.activation(self.linear(vectors.to(self.linear.weight.dtype))).float()
        return result


class Normalize(nn.Module):
    def forward(self, vectors: torch.Tensor) -> torch.Tensor:
        return nn.functional.normalize(vectors, dim=1)


# -- weights ---------------------------------------------------------------------------------------


def load_transformer(cls: Any, path: Path, dtype: torch.dtype, name: str) -> nn.Module:
    """With all weights that tokens' vectors need. Raises: EncoderError listing keys that are wrong."""
    model: nn.Module = load_strictly(_WithoutHeads(cls), path, dtype, name)
    return model


class _WithoutHeads:
    """A class of transformers, for which `load_strictly` says nothing of what is aside."""

    def __init__(self, cls: Any) -> None:
        self._cls, self.__name__ = cls, cls.__name__

    def from_pretrained(self, path: Path, **how: Any) -> tuple[Any, dict[str, Any]]:
        model, info = self._cls.from_pretrained(path, **how)
        loose = ("missing_keys", "unexpected_keys")
        return model, {
            problem: [key for key in keys if not (problem in loose and _ASIDE.match(str(key)))]
            for problem, keys in info.items()
        }


def load_dense(step: dict[str, Any], file: Path, dtype: torch.dtype, name: str) -> Dense:
    """Raises: EncoderError listing keys that are missing, unexpected or of another shape."""
    dense = Dense(step["inputs"], step["outputs"], step["bias"], step["activation"]).to(dtype)
    try:
        safe = file.suffix == ".safetensors"
        dense.load_state_dict(load_file(file) if safe else torch.load(file, map_location="cpu", weights_only=True))
    except Exception as error:
        raise EncoderError(f"{name}: {step['path']} is not such a Dense: {error}", "Repair the checkpoint.") from error
    return dense
