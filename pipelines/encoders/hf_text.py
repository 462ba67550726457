"""The tokenizers of transformers' models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipelines.encoders import weights
from pipelines.encoders.base import EncoderSpec, Tokenizer
from pipelines.encoders.light_tokenizer import kept
from pipelines.errors import EncoderError


def tokenizer(spec: EncoderSpec) -> Tokenizer:
    folder = weights.folder(spec.reference, spec.options)
    tokens = kept(spec.details["tokenizer"]) or folder_tokenizer(folder, spec.name)

    def tokenize(captions: list[str]) -> NDArray[np.int32]:
        """int32 [n, context_length], padded to the full length."""
        rows = np.full((len(captions), spec.context_length), tokens.pad_token_id, np.int32)
        found = tokens(captions, truncation=True, max_length=spec.context_length)["input_ids"]
        for row, ids in zip(rows, found, strict=True):
            row[: len(ids)] = ids
        return rows

    return tokenize


def folder_tokenizer(folder: weights.Folder, name: str) -> Any:
    """Of a model's folder. Raises: EncoderError."""
    return library_tokenizer(folder.fetch(weights.small(folder.names())), name)


def library_tokenizer(path: Path, name: str = "") -> Any:
    """name: for messages. Raises: EncoderError where the library cannot have it from its files alone."""
    from transformers import AutoTokenizer

    return from_files(AutoTokenizer, path, name or str(path))


def from_files(auto: Any, path: Path, name: str, **more: Any) -> Any:
    """What a class of transformers makes of a model's files, without running code that comes with them.

    Raises: EncoderError.
    """
    try:
        return auto.from_pretrained(path, local_files_only=True, trust_remote_code=False, **more)
    except Exception as error:
        raise EncoderError(f"{name}: {auto.__name__} cannot read it: {error}", remedy(error)) from error


def remedy(error: Exception) -> str:
    """What to do about what a library says of a model's files."""
    if "trust_remote_code" in str(error):
        return "Use a model that needs no code of its own: such code is never run."
    if isinstance(error, ImportError):
        return f"Install {error.name or 'the package it names'}, or use a model that does without."
    return "Check that its files are whole, and that the installed libraries know such a model."
