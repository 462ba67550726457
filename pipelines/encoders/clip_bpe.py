"""CLIP's own tokenizer, id for id open_clip's `SimpleTokenizer`, without the gigabyte that importing open_clip takes.

Decode workers, of which a node has dozens, tokenize captions and need nothing else of it.
"""

from __future__ import annotations

import gzip
import html
import importlib.util
from functools import lru_cache
from pathlib import Path

import ftfy
import numpy as np
import regex
from numpy.typing import NDArray
from tokenizers import models

from pipelines.encoders.base import Tokenizer

_START, _END = "<start_of_text>", "<end_of_text>"
_MERGES = 49_152 - 256 - 2
_WORDS = regex.compile(
    rf"{_START}|{_END}|'s|'t|'re|'ve|'m|'ll|'d|[\p{{L}}]+|[\p{{N}}]|[^\s\p{{L}}\p{{N}}]+", regex.IGNORECASE
)


def vocabulary() -> Path:
    """The merges, as open_clip ships them."""
    package = importlib.util.find_spec("open_clip")
    assert package is not None and package.submodule_search_locations
    return Path(package.submodule_search_locations[0]) / "bpe_simple_vocab_16e6.txt.gz"


def clip_bpe(context_length: int) -> Tokenizer:
    """Captions longer than `context_length` are cut, their last token the end of text."""
    letters = _letters()
    ids, bpe = _load(letters)

    @lru_cache(maxsize=2**17)
    def ids_of(word: str) -> list[int]:
        if word in (_START, _END):
            return [ids[word]]
        return [token.id for token in bpe.tokenize("".join(letters[byte] for byte in word.encode()))]

    def tokenize(captions: list[str]) -> NDArray[np.int32]:
        """int32 [n, context_length]."""
        tokens = np.zeros((len(captions), context_length), np.int32)
        for row, caption in zip(tokens, captions, strict=True):
            inner = [id for word in _WORDS.findall(_clean(caption)) for id in ids_of(word)]
            found = [ids[_START], *inner[: context_length - 2], ids[_END]]
            row[: len(found)] = found
        return tokens

    return tokenize


def _load(letters: dict[int, str]) -> tuple[dict[str, int], models.BPE]:
    lines = gzip.decompress(vocabulary().read_bytes()).decode().split("\n")
    pairs: list[tuple[str, str]] = [(line.split()[0], line.split()[1]) for line in lines[1 : 1 + _MERGES]]
    single = letters.values()
    words = [*single, *(f"{letter}</w>" for letter in single), *("".join(pair) for pair in pairs), _START, _END]
    ids = {word: id for id, word in enumerate(words)}
    return ids, models.BPE(vocab=ids, merges=pairs, end_of_word_suffix="</w>")


def _letters() -> dict[int, str]:
    """A printable character for each byte, in the vocabulary's order: those that print stand for themselves."""
    printing = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    silent = [byte for byte in range(256) if byte not in printing]
    return {byte: chr(byte) for byte in printing} | {byte: chr(256 + i) for i, byte in enumerate(silent)}


def _clean(caption: str) -> str:
    text = html.unescape(html.unescape(ftfy.fix_text(caption)))
    return " ".join(text.split()).lower()
