"""Captions as BEiT-3 reads them, by its sentencepiece model."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from pipelines.encoders.base import EncoderSpec, Tokenizer
from pipelines.encoders.beit3_source import resolve
from pipelines.errors import EncoderError

_START, _END, _UNKNOWN = 0, 2, 3
# The model's vocabulary begins with four tokens of its own, that of sentencepiece with three.
_OFFSET = 1


def tokenizer(spec: EncoderSpec) -> Tokenizer:
    from sentencepiece import SentencePieceProcessor

    vocabulary = resolve(spec.reference, spec.options).vocabulary
    try:
        pieces = SentencePieceProcessor(model_file=str(vocabulary.fetched()))
    except (OSError, RuntimeError) as error:
        raise EncoderError(
            f"{vocabulary.reference} is no sentencepiece model: {error}", "Name BEiT-3's beit3.spm by ?spm=FILE."
        ) from error

    def tokenize(captions: list[str]) -> Iterator[NDArray[np.int32]]:
        """int32 arrays of `<s>`, at most context_length - 2 pieces, `</s>`; without padding."""
        for encoded in pieces.encode(captions):
            ids = [piece + _OFFSET if piece else _UNKNOWN for piece in encoded[: spec.context_length - 2]]
            yield np.array([_START, *ids, _END], np.int32)

    return tokenize
