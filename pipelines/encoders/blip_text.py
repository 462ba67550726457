"""Captions for BLIP: at most 35 tokens, as it was trained for retrieval."""

from __future__ import annotations

from pipelines.encoders.base import EncoderSpec, Tokenizer
from pipelines.encoders.blip_captions import tokenizer_of

CONTEXT_LENGTH = 35
SPECIAL = ("[DEC]", "[ENC]")
"""What BLIP added to BERT's vocabulary, in order. A caption that is read with its image begins with [ENC]."""


def tokenizer(spec: EncoderSpec) -> Tokenizer:
    return tokenizer_of(spec, SPECIAL)
