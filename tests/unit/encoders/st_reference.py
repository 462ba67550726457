"""A folder of sentence-transformers read naively, a text at a time, with transformers alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from safetensors.torch import load_file


def json_of(path: Path) -> Any:
    return json.loads(path.read_text())


class Naive:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.model = transformers.AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        self.settings = json_of(folder / "sentence_bert_config.json")
        self.kinds = [module["type"].rpartition(".")[2] for module in json_of(folder / "modules.json")]

    @torch.no_grad()
    def __call__(
        self, text: str, prompt: str = "", pools: tuple[str, ...] = (), layer: int | None = None
    ) -> np.ndarray:
        text = (prompt + text).strip()
        text = text.lower() if self.settings.get("do_lower_case") else text
        longest = self.settings["max_seq_length"] or self.model.config.max_position_embeddings
        inputs = self.tokenizer([text], truncation=True, max_length=longest, return_tensors="pt")
        found = self.model(**inputs, output_hidden_states=True)
        tokens = (found.last_hidden_state if layer is None else found.hidden_states[layer])[0]
        vector = torch.cat([pooled(tokens, pool) for pool in pools or self.pools()])
        if "Dense" in self.kinds:
            vector = self.dense(vector)
        return (vector / vector.norm() if "Normalize" in self.kinds else vector).numpy()

    def pools(self) -> tuple[str, ...]:
        config = json_of(self.folder / "1_Pooling" / "config.json")
        if "pooling_mode" in config:
            return (config["pooling_mode"],)
        order = ("cls_token", "max_tokens", "mean_tokens", "mean_sqrt_len_tokens", "weightedmean_tokens", "lasttoken")
        return tuple(mode for mode in order if config[f"pooling_mode_{mode}"])

    def dense(self, vector: torch.Tensor) -> torch.Tensor:
        folder = self.folder / "2_Dense"
        safe = (folder / "model.safetensors").exists()
        state = load_file(folder / "model.safetensors") if safe else torch.load(folder / "pytorch_model.bin")
        vector = state["linear.weight"] @ vector + state.get("linear.bias", 0)
        return torch.tanh(vector) if "Tanh" in json_of(folder / "config.json")["activation_function"] else vector


def pooled(tokens: torch.Tensor, pool: str) -> torch.Tensor:
    """[dim] of [length, dim]."""
    count = torch.arange(1, len(tokens) + 1)[:, None]
    return {
        "cls": tokens[0],
        "lasttoken": tokens[-1],
        "max": tokens.max(0).values,
        "mean": tokens.mean(0),
        "mean_sqrt_len": tokens.sum(0) / len(tokens) ** 0.5,
        "weightedmean": (tokens * count).sum(0) / count.sum(),
    }[pool.removesuffix("_tokens").removesuffix("_token")]
