"""Captions as matchers read them: words of a vocabulary of their own."""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from pipelines.encoders.base import EncoderSpec, Tokenizer
from pipelines.encoders.matcher_folder import END, START, folder_of, read_vocabulary
from pipelines.errors import EncoderError

UNKNOWN_ID = 1
_WORD = re.compile(r"[^\W_]+")
_APOSTROPHES = str.maketrans("", "", "'\N{RIGHT SINGLE QUOTATION MARK}")


def words_of(caption: str) -> list[str]:
    """Lower-cased, punctuation stripped: `The dog's ball.` is `the`, `dogs`, `ball`."""
    return _WORD.findall(unicodedata.normalize("NFC", caption).lower().translate(_APOSTROPHES))


class WordTokenizer:
    """Words to their lines in the vocabulary; between <start> and <end>, where the vocabulary has these."""

    def __init__(self, vocabulary: Sequence[str], max_words: int) -> None:
        self._ids = {word: at for at, word in enumerate(vocabulary)}
        self._max_words = max_words
        self._bounds = [[self._ids[mark]] if mark in self._ids else [] for mark in (START, END)]

    @property
    def longest(self) -> int:
        return self._max_words + sum(map(len, self._bounds))

    def __call__(self, captions: list[str]) -> list[NDArray[np.int32]]:
        """One array a caption, without padding, of at least one id."""
        return [np.array(self._ids_of(caption), np.int32) for caption in captions]

    def _ids_of(self, caption: str) -> list[int]:
        words = words_of(caption)[: self._max_words]
        start, end = self._bounds
        # The signs of a vocabulary are no words: none has a < in it.
        return [*start, *(self._ids.get(word, UNKNOWN_ID) for word in words), *end] or [UNKNOWN_ID]


def vocabulary_digest(vocabulary: Sequence[str]) -> str:
    return hashlib.sha256("\n".join(vocabulary).encode()).hexdigest()


def tokenizer(spec: EncoderSpec) -> Tokenizer:
    """Raises: EncoderError where the vocabulary is no longer what it was."""
    folder, name = folder_of(spec.reference, spec.options), spec.details["config"]["vocab"]
    vocabulary = read_vocabulary(folder.fetch([name]) / name, spec.reference)
    if vocabulary_digest(vocabulary) != spec.details["vocabulary"]:
        raise EncoderError(f"{spec.reference}/{name} has changed since the run was planned.", "Put the old one back.")
    return WordTokenizer(vocabulary, spec.details["config"]["max_words"])
