"""Captions for BLIP-2: at most 32 tokens, as it was trained."""

from __future__ import annotations

from pipelines.encoders.base import EncoderSpec, Tokenizer
from pipelines.encoders.blip_captions import tokenizer_of

CONTEXT_LENGTH = 32
SPECIAL = ("[DEC]",)
"""What BLIP-2 added to BERT's vocabulary."""


def tokenizer(spec: EncoderSpec) -> Tokenizer:
    return tokenizer_of(spec, SPECIAL)
