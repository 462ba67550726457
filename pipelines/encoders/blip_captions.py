"""BERT's tokenizer for BLIP and BLIP-2: where its vocabulary comes from, and captions to token ids.

Imported by decode workers, so nothing here imports torch.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipelines.encoders import weights
from pipelines.encoders.base import EncoderSpec, Tokenizer
from pipelines.encoders.hf_text import folder_tokenizer, from_files
from pipelines.encoders.light_tokenizer import kept
from pipelines.encoders.name import EncoderName
from pipelines.errors import EncoderError

VOCABULARY = "bert-base-uncased"
FILE_SUFFIXES = (".pth", ".pt")

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.txt", "special_tokens_map.json")

Storage = dict[str, dict[str, Any]]


def tokenizer_of(spec: EncoderSpec, special: tuple[str, ...]) -> Tokenizer:
    """int32 ids of each caption, from [CLS] to [SEP], not padded. special: what a file's vocabulary lacks."""
    tokens = kept(spec.details["tokenizer"]) or tokens_at(spec.reference, special, spec.options, spec.name)
    words = int(spec.details["words"])

    def tokenize(captions: list[str]) -> list[NDArray[np.int32]]:
        rows = tokens(captions, truncation=True, max_length=spec.context_length)["input_ids"]
        arrays = [np.asarray(ids, np.int32) for ids in rows]
        # BLIP-2's tokenizers know `<image>`, which its text embeddings do not.
        return [np.where(ids < words, ids, tokens.unk_token_id).astype(np.int32) for ids in arrays]

    return tokenize


def tokens_at(reference: str, special: tuple[str, ...], storage: Storage, name: str) -> Any:
    """The tokenizer of a spec's reference: a folder's own; of a file, that of its `vocab`, with the special tokens.

    Raises: EncoderError, ConfigError.
    """
    parsed = EncoderName.parse(f"blip:{reference}")
    if not parsed.reference.endswith(FILE_SUFFIXES):
        return folder_tokenizer(weights.folder(parsed.reference, storage), name)
    tokens = _vocabulary(parsed.options["vocab"], storage)
    tokens.add_tokens(list(special), special_tokens=True)
    return tokens


def pinned_vocabulary(reference: str, storage: Storage) -> str:
    """`reference` as it leads to the same vocabulary from any node."""
    if reference.endswith(".txt"):
        folder, name = weights.containing(reference, storage)
        return f"{folder.reference}/{name}"
    return weights.folder(reference, storage).reference


def _vocabulary(reference: str, storage: Storage) -> Any:
    """Of a vocab.txt (one word a line), a tokenizer's folder, or a model of the hub."""
    from transformers import BertTokenizer

    if reference.endswith(".txt"):
        folder, name = weights.containing(reference, storage)
        return BertTokenizer(vocab=str(folder.fetch([name]) / name))
    folder = weights.folder(reference, storage)
    if not (files := [name for name in folder.names() if name in _TOKENIZER_FILES]):
        raise EncoderError(f"{folder.reference} holds no tokenizer.", f"Name one that has {_TOKENIZER_FILES[2]}.")
    return from_files(BertTokenizer, folder.fetch(files), folder.reference)
