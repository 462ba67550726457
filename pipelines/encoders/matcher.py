"""Matchers that `vecmill train` made: a folder of config.json, model.safetensors and vocab.txt, local or at a URL.

Images and captions have vectors in one space. `demo` is the one that comes with the package.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from pipelines.contracts import VectorSpec
from pipelines.encoders import weights
from pipelines.encoders.base import EncoderSpec, ImageTransform
from pipelines.encoders.batch import DTYPES
from pipelines.encoders.matcher_folder import SHIPPED, WEIGHTS, MatcherConfig, folder_of, read_config, read_vocabulary
from pipelines.encoders.matcher_model import Matcher
from pipelines.encoders.matcher_text import WordTokenizer, vocabulary_digest
from pipelines.encoders.name import EncoderName
from pipelines.encoders.torch_encoder import TorchEncoder
from pipelines.errors import EncoderError

EXAMPLES = ("matcher:DIR", "matcher:s3://models/pedes", "demo")
OPTIONS: dict[str, str] = {}
CLASSIFIER = "classifier.weight"
"""Of training; a folder may have it, and no vector needs it."""


def describe(name: EncoderName, storage: dict[str, dict[str, Any]]) -> EncoderSpec:
    folder = folder_of(name.reference or SHIPPED, storage)
    path = folder.fetch(weights.small(folder.names()))
    config = read_config(path, folder.reference)
    vocabulary = read_vocabulary(path / config.vocab, folder.reference)
    return EncoderSpec(
        name=name.text,
        family="matcher",
        reference=folder.reference if name.reference else SHIPPED,
        vectors={modality: VectorSpec(config.embed_dim) for modality in ("image", "text")},
        image=image_transform(config),
        context_length=WordTokenizer(vocabulary, config.max_words).longest,
        weights=folder.digest([WEIGHTS]),
        details={"config": asdict(config), "vocabulary": vocabulary_digest(vocabulary), "words": len(vocabulary)},
        options=storage,
    )


def image_transform(config: MatcherConfig) -> ImageTransform:
    """Squashed to the size, as the authors' own code does it."""
    return ImageTransform(
        resize="squash",
        size=config.image_size,
        crop=None,
        resample="bilinear",
        alpha="drop",
        rgb="first",
        library="torchvision",
        mean=config.mean,
        std=config.std,
    )


def load(spec: EncoderSpec, device: torch.device) -> MatcherEncoder:
    folder = folder_of(spec.reference, spec.options)
    path = weights.fetch_verified(folder, [WEIGHTS, *weights.small(folder.names())], [WEIGHTS], spec.weights)
    model = Matcher(read_config(path, spec.reference), spec.details["words"])
    load_strictly(model, path / WEIGHTS, spec.name)
    return MatcherEncoder(spec, device, model.to(DTYPES[spec.precision]))


def load_strictly(model: Matcher, file: Path, name: str) -> None:
    """Raises: EncoderError for missing, unexpected or misshapen weights."""
    try:
        held = {key: value.float() if value.is_floating_point() else value for key, value in load_file(file).items()}
        held.pop(CLASSIFIER, None)
        model.load_state_dict(held)
    except Exception as error:
        raise EncoderError(
            f"{name}: its weights do not fit its config.json: {error}", "Copy the folder again."
        ) from error


class MatcherEncoder(TorchEncoder):
    """Both towers on one device. Vectors are float32, raw."""

    def image(self, pixels: torch.Tensor) -> torch.Tensor:
        return self.model.image(pixels).float()  # type: ignore[no-any-return]

    def text(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return self.model.text(ids, mask).float()  # type: ignore[no-any-return]
