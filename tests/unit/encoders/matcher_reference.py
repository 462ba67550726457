"""A matcher written out once more: torchvision's transform, timm's tower, and the LSTM's equations in NumPy."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import timm
import torch
from safetensors.numpy import load_file
from torchvision import transforms

from tests.unit.encoders.reference import opened


class MatcherReference:
    def __init__(self, folder: Path) -> None:
        self.config = json.loads((folder / "config.json").read_text())
        self.words = (folder / "vocab.txt").read_text().split("\n")[:-1]
        self.weights = {
            name: value.astype(np.float64) for name, value in load_file(folder / "model.safetensors").items()
        }
        tower = timm.create_model(self.config["image_tower"], num_classes=0, **self.config["image_arguments"])
        tower.load_state_dict(
            {
                name.removeprefix("image_tower."): torch.from_numpy(value)
                for name, value in self.weights.items()
                if name.startswith("image_tower.")
            }
        )
        self.tower = tower.eval().float()
        self.transform = transforms.Compose(
            [
                transforms.Resize(tuple(self.config["image_size"]), transforms.InterpolationMode.BILINEAR),
                transforms.ToTensor(),
                transforms.Normalize(self.config["mean"], self.config["std"]),
            ]
        )

    def _head(self, name: str, features: np.ndarray) -> np.ndarray:
        return self.weights[f"{name}_head.weight"] @ features + self.weights[f"{name}_head.bias"]

    @torch.no_grad()
    def image(self, data: bytes) -> np.ndarray:
        pixels = self.transform(opened(data).convert("RGB")).unsqueeze(0)
        return self._head("image", self.tower(pixels)[0].double().numpy())

    def ids(self, caption: str) -> list[int]:
        words = re.sub(r"[^\w\s]|_", " ", caption.lower().replace("'", "").replace("’", "")).split()
        known = [self.words.index(word) if word in self.words else 1 for word in words[: self.config["max_words"]]]
        if "<start>" in self.words:
            known = [self.words.index("<start>"), *known, self.words.index("<end>")]
        return known or [1]

    def text(self, caption: str) -> np.ndarray:
        words = self.weights["text_tower.words.weight"][self.ids(caption)]
        forwards, backwards = self._lstm(words, ""), self._lstm(words[::-1], "_reverse")[::-1]
        return self._head("text", np.concatenate([forwards, backwards], axis=1).max(axis=0))

    def _lstm(self, words: np.ndarray, suffix: str) -> np.ndarray:
        """Hochreiter and Schmidhuber, 1997, with forget gates; gates in torch's order."""
        w, u, b, c = (
            self.weights[f"text_tower.lstm.{name}_l0{suffix}"]
            for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
        )
        hidden = cell = np.zeros(self.config["lstm_hidden"])
        outputs = []
        for word in words:
            into, forget, new, out = np.split(w @ word + b + u @ hidden + c, 4)
            cell = sigmoid(forget) * cell + sigmoid(into) * np.tanh(new)
            hidden = sigmoid(out) * np.tanh(cell)
            outputs.append(hidden)
        return np.stack(outputs)


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))
