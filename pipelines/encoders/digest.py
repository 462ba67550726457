"""Digests of model files: what makes two checkpoints, or two tokenizers, the same."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any


def file_digest(path: Path, cache: Path) -> str:
    """sha256 of a file, remembered in `cache` by path, size and time of change."""
    path = path.resolve()
    stat = path.stat()
    memory = cache / "digests" / sha256(f"{path}:{stat.st_size}:{stat.st_mtime_ns}")
    with suppress(OSError):
        return memory.read_text()
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    with suppress(OSError):  # a node without a home folder computes it anew
        memory.parent.mkdir(parents=True, exist_ok=True)
        temporary = memory.with_name(f"{memory.name}.{os.getpid()}.tmp")
        temporary.write_text(digest)
        temporary.replace(memory)
    return digest


def vocabulary_digest(tokenizer: Any) -> str:
    """sha256 of all that a transformers tokenizer turns text into ids by, fresh from its files."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        return sha256(backend.to_str())
    settings = sorted((key, str(value)) for key, value in vars(tokenizer).items() if key.startswith("do_"))
    model = hashlib.sha256(Path(tokenizer.vocab_file).read_bytes()).hexdigest()
    return sha256(json.dumps([type(tokenizer).__name__, settings, model, sorted(tokenizer.get_added_vocab().items())]))


def combined(tokens: Iterable[str]) -> str:
    """One file's digest is its own; several files' the digest of theirs, in order."""
    listed = list(tokens)
    return listed[0] if len(listed) == 1 else sha256("\n".join(listed))


def sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
