"""The tokenizers of transformers' models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipelines.encoders import weights
from pipelines.encoders.base import EncoderSpec, Tokenizer


def tokenizer(spec: EncoderSpec) -> Tokenizer:
    folder = weights.folder(spec.reference, spec.options)
    tokens = library_tokenizer(folder.fetch(weights.small(folder.names())))

    def tokenize(captions: list[str]) -> NDArray[np.int32]:
        """int32 [n, context_length], padded to the full length."""
        encoded = tokens(captions, padding="max_length", truncation=True, max_length=spec.context_length)
        return np.asarray(encoded["input_ids"], np.int32)

    return tokenize


def library_tokenizer(path: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(path, local_files_only=True)
