"""Captions as models of sentence-transformers read them."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from pipelines.encoders import weights
from pipelines.encoders.base import EncoderSpec, Tokenizer
from pipelines.encoders.hf_text import folder_tokenizer
from pipelines.encoders.light_tokenizer import kept
from pipelines.encoders.st_source import place


def tokenizer(spec: EncoderSpec) -> Tokenizer:
    """Puts details["prompt"] before each caption; for queries, give a spec that has details["query_prompt"] there."""
    tokens = kept(spec.details["tokenizer"]) or folder_tokenizer(
        place(weights.folder(spec.reference, spec.options), spec.details["transformer"]), spec.name
    )
    # Of a vocabulary that marks no beginning or end, an empty caption has no token, and a model needs one.
    nothing = [tokens.pad_token_id or tokens.eos_token_id or 0]

    def tokenize(captions: list[str]) -> list[NDArray[np.int32]]:
        """int32 arrays of at most context_length ids, without padding."""
        texts = [(spec.details["prompt"] + caption).strip() for caption in captions]
        if spec.details["lower"]:
            texts = [text.lower() for text in texts]
        encoded = tokens(texts, truncation=True, max_length=spec.context_length)["input_ids"]
        return [np.array(ids or nothing, np.int32) for ids in encoded]

    return tokenize
