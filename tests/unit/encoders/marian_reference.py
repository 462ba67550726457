"""Marian used as its manual shows, a text at a time."""

from __future__ import annotations

from pathlib import Path

import torch
import transformers


class MarianReference:
    def __init__(self, folder: Path) -> None:
        self.tokens = transformers.MarianTokenizer.from_pretrained(folder)
        self.model = transformers.AutoModelForSeq2SeqLM.from_pretrained(folder, dtype=torch.float32).eval()

    @torch.no_grad()
    def __call__(self, text: str) -> str:
        inputs = self.tokens([text], return_tensors="pt", truncation=True, max_length=128)
        return self.tokens.decode(self.model.generate(**inputs)[0], skip_special_tokens=True)
