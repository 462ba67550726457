"""The tokenizers of open_clip's models. CLIP's own, which nearly all have, comes without importing open_clip."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from pipelines.encoders import weights
from pipelines.encoders.base import EncoderSpec, Tokenizer
from pipelines.encoders.clip_bpe import clip_bpe, vocabulary
from pipelines.encoders.digest import vocabulary_digest
from pipelines.encoders.hf_text import remedy
from pipelines.errors import EncoderError

if TYPE_CHECKING:
    from pipelines.encoders.open_clip_source import Source

# A token of CLIP's vocabulary has at most 32 characters; 77 of them never reach this far.
_LONGEST_CAPTION = 16_384


def tokenizer(spec: EncoderSpec) -> Tokenizer:
    tokens = clip_bpe(spec.context_length) if _is_clips_own(spec) else _library_tokenizer_of(spec)

    def tokenize(captions: list[str]) -> NDArray[np.int32]:
        """int32 [n, context_length]."""
        return np.asarray(tokens([_bounded(caption) for caption in captions]), np.int32)

    return tokenize


def library_tokenizer(source: Source) -> Any:
    """open_clip's own, whichever the model names. Raises: EncoderError where it cannot be had without running code
    that comes with the model."""
    import open_clip

    path = Path() if source.arch else source.folder.fetch(weights.small(source.folder.names()))
    is_of_transformers = bool(source.model["text_cfg"].get("hf_tokenizer_name"))
    try:
        # Goes before what the model's own configuration says.
        return open_clip.get_tokenizer(
            source.identifier(path), **({"trust_remote_code": False} if is_of_transformers else {})
        )
    except Exception as error:
        raise EncoderError(f"{source.reference}: its tokenizer cannot be made: {error}", remedy(error)) from error


def tokenizer_digest(tokens: Any) -> str:
    from open_clip.tokenizer import SimpleTokenizer

    return _clip_digest() if isinstance(tokens, SimpleTokenizer) else vocabulary_digest(tokens.tokenizer)


def _clip_digest() -> str:
    return hashlib.sha256(vocabulary().read_bytes()).hexdigest()


def _is_clips_own(spec: EncoderSpec) -> bool:
    """With its usual cleaning, that is; `tokenizer_kwargs` may name another."""
    return spec.details["tokenizer"] == _clip_digest() and not spec.details["model"]["text_cfg"].get("tokenizer_kwargs")


def _library_tokenizer_of(spec: EncoderSpec) -> Any:
    from pipelines.encoders.open_clip_source import resolve

    return library_tokenizer(resolve(spec.reference, spec.options))


def _bounded(caption: str) -> str:
    """No more than can reach the model: cleaning a caption of megabytes, or its one long word, takes minutes."""
    return caption if len(caption) <= _LONGEST_CAPTION else " ".join(caption.split())[:_LONGEST_CAPTION]
