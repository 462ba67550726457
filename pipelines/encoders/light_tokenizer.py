"""Tokenizers of transformers without transformers, which takes seconds and half a gigabyte to import.

Whoever describes an encoder keeps the tokenizer's fast part on the node, under its digest; decode workers take it from
there, and do without where it is not to be had. https://huggingface.co/docs/tokenizers
"""

from __future__ import annotations

import json
import os
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from tokenizers import Tokenizer as FastTokenizer

from pipelines.encoders.digest import sha256, vocabulary_digest
from pipelines.encoders.weights import default_cache

_PADDING, _UNKNOWN, _END = "pad", "unknown", "end"


@dataclass(frozen=True)
class LightTokenizer:
    """The calls that tokenizers of transformers are used by here, and their special ids."""

    fast: FastTokenizer
    pad_token_id: Any
    unk_token_id: Any
    eos_token_id: Any

    def __call__(self, captions: list[str], truncation: bool, max_length: int) -> dict[str, list[list[int]]]:
        self.fast.enable_truncation(max_length) if truncation else self.fast.no_truncation()
        return {"input_ids": [encoded.ids for encoded in self.fast.encode_batch(captions)]}


def kept_digest(tokens: Any) -> str:
    """`vocabulary_digest` of a tokenizer, fresh from its files, which is kept on this node where it has a fast part."""
    digest = vocabulary_digest(tokens)
    backend = getattr(tokens, "backend_tokenizer", None)
    path = _path(digest)
    if backend is not None and not path.exists():
        ids = {_PADDING: tokens.pad_token_id, _UNKNOWN: tokens.unk_token_id, _END: tokens.eos_token_id}
        with suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
            temporary.write_text(json.dumps({"backend": backend.to_str(), **ids}), encoding="utf-8")
            temporary.replace(path)
    return digest


def kept(digest: str) -> LightTokenizer | None:
    """None where this node does not have it, or has something else under its name."""
    try:
        told = json.loads(_path(digest).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    if sha256(told["backend"]) != digest:
        return None
    fast = FastTokenizer.from_str(told["backend"])
    # Some were saved with the padding of whoever used them last; transformers takes it off too.
    fast.no_padding()
    return LightTokenizer(fast, told[_PADDING], told[_UNKNOWN], told[_END])


def _path(digest: str) -> Any:
    return default_cache() / "tokenizers" / f"{digest}.json"
