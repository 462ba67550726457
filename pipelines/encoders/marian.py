"""Translation of captions by Marian models (https://huggingface.co/docs/transformers/model_doc/marian).

A folder or hub name with `@revision`, as for encoders; `Helsinki-NLP/opus-mt-it-en` where a pair alone is named.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import transformers

from pipelines.encoders import weights
from pipelines.encoders.hf_text import from_files
from pipelines.encoders.hf_weights import checkpoint_files, load_strictly
from pipelines.errors import EncoderError

CLASS = "MarianMTModel"


@dataclass(frozen=True)
class TranslationSpec:
    """A model and what it translates. pair: as `it:en`. weights: digest of all files that decide a translation.

    options: file system options; no part of what decides a translation.
    """

    pair: str
    reference: str
    weights: str
    options: dict[str, dict[str, Any]] = field(default_factory=dict, hash=False, repr=False)

    def identity(self) -> dict[str, str]:
        return {"pair": self.pair, "weights": self.weights}


def describe(pair: str, model: str | None, options: dict[str, dict[str, Any]]) -> TranslationSpec:
    """Reads configurations, no weights. Raises: ConfigError, EncoderError for a model that does not translate."""
    folder = weights.folder(model or default_model(pair), options)
    names = folder.names()
    path = folder.fetch(weights.small(names))
    config = from_files(transformers.AutoConfig, path, folder.reference)
    if CLASS not in (getattr(config, "architectures", None) or []):
        raise EncoderError(
            f"{folder.reference} is no {CLASS}: it does not translate.", "Name one: --set translate.model=…"
        )
    return TranslationSpec(pair, folder.reference, folder.digest(deciding(folder)), options)


def default_model(pair: str) -> str:
    return f"Helsinki-NLP/opus-mt-{pair.replace(':', '-')}"


def deciding(folder: weights.Folder) -> list[str]:
    """Files that decide a translation: weights, vocabularies, and how beams are searched."""
    names = folder.names()
    vocabularies = [name for name in names if name.endswith(".spm")]
    return sorted({*checkpoint_files(folder), *vocabularies, *weights.small(names)})


class Translator:
    """A loaded model on one device, in fp32: in half precision, beam search depends on what else is in the batch."""

    def __init__(self, spec: TranslationSpec, device: torch.device, batch_size: int) -> None:
        folder = weights.folder(spec.reference, spec.options)
        files = deciding(folder)
        path = weights.fetch_verified(folder, files, files, spec.weights)
        self._tokens = from_files(transformers.MarianTokenizer, path, spec.reference)
        model = load_strictly(transformers.MarianMTModel, path, torch.float32, spec.reference)
        self._model, self._device, self._batch_size = model.to(device).eval(), device, batch_size

    @torch.inference_mode()
    def __call__(self, texts: list[str]) -> list[str]:
        """Each translated, longest first in batches of like length."""
        order = sorted(range(len(texts)), key=lambda at: -len(texts[at]))
        translated: dict[int, str] = {}
        for start in range(0, len(order), self._batch_size):
            batch = order[start : start + self._batch_size]
            translated |= dict(zip(batch, self._fitting([texts[at] for at in batch]), strict=True))
        return [translated[at] for at in range(len(texts))]

    def _fitting(self, texts: list[str]) -> list[str]:
        """In halves, where the device has not the memory for all."""
        try:
            return self._batch(texts)
        except torch.OutOfMemoryError:
            if len(texts) == 1:
                raise
            half = len(texts) // 2
            return self._fitting(texts[:half]) + self._fitting(texts[half:])

    def _batch(self, texts: list[str]) -> list[str]:
        longest = self._model.config.max_position_embeddings
        encoded = self._tokens(texts, padding=True, truncation=True, max_length=longest, return_tensors="pt")
        found: list[str] = self._tokens.batch_decode(
            self._model.generate(**encoded.to(self._device)), skip_special_tokens=True
        )
        return found
