"""The tokenizers of transformers' models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipelines.encoders import weights
from pipelines.encoders.base import EncoderSpec, Tokenizer
from pipelines.errors import EncoderError


def tokenizer(spec: EncoderSpec) -> Tokenizer:
    folder = weights.folder(spec.reference, spec.options)
    tokens = library_tokenizer(folder.fetch(weights.small(folder.names())), spec.name)

    def tokenize(captions: list[str]) -> NDArray[np.int32]:
        """int32 [n, context_length], padded to the full length."""
        encoded = tokens(captions, padding="max_length", truncation=True, max_length=spec.context_length)
        return np.asarray(encoded["input_ids"], np.int32)

    return tokenize


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
