"""Models of transformers: a hub name with `@revision`, a folder, or a folder in object storage.

CLIP, SigLIP and SigLIP2 (`hf_towers`), and backbones of images alone, as ViT and DINOv2 (`hf_vision`).
https://huggingface.co/docs/transformers
"""

from __future__ import annotations

from typing import Any

import torch
import transformers

from pipelines.encoders import hf_towers, hf_vision, weights
from pipelines.encoders.base import Encoder, EncoderSpec
from pipelines.encoders.hf_text import from_files
from pipelines.encoders.hf_weights import checkpoint_files
from pipelines.encoders.name import EncoderName
from pipelines.errors import ConfigError, EncoderError

EXAMPLES = (
    "hf:google/siglip2-base-patch16-224",
    "hf:openai/clip-vit-base-patch32@main",
    "hf:s3://models/clip",
    "hf:facebook/dinov2-base?pool=mean",
)
OPTIONS: dict[str, str] = {
    "pool": "image backbones: mean (of the patch tokens, or over space), cls or first (token 0), pooler "
    "(pooler_output); the model's documented one if left out",
    "layer": "image backbones: which of hidden_states to pool, as -1 of EfficientNet's, which are before a final "
    "norm or convolution; the last hidden state, which is behind it, if left out",
}


def describe(name: EncoderName, storage: dict[str, dict[str, Any]]) -> EncoderSpec:
    folder = weights.folder(name.reference, storage)
    names = folder.names()
    if "config.json" not in names:
        raise EncoderError(f"{folder.reference} holds no config.json.", f"There: {', '.join(names) or 'nothing'}.")
    path = folder.fetch(weights.small(names))
    config = from_files(transformers.AutoConfig, path, folder.reference)
    described = _kind(config, folder.reference).described(name, path, folder.reference, config)
    return EncoderSpec(
        name=name.text,
        family="hf",
        reference=folder.reference,
        weights=folder.digest(checkpoint_files(folder)),
        options=storage,
        **described,
    )


def load(spec: EncoderSpec, device: torch.device) -> Encoder:
    folder = weights.folder(spec.reference, spec.options)
    checkpoint = checkpoint_files(folder)
    files = [*checkpoint, *weights.small(folder.names())]
    path = weights.fetch_verified(folder, files, checkpoint, spec.weights)
    kind: Any = hf_towers if spec.details["model"] in hf_towers.MODELS else hf_vision
    return kind.loaded(spec, device, path)  # type: ignore[no-any-return]


def _kind(config: Any, reference: str) -> Any:
    """By the class that was saved; the model type alone also names towers and classifiers."""
    for kind in (hf_towers, hf_vision):
        if kind.model_class(config) is not None:
            return kind
    saved = (getattr(config, "architectures", None) or [config.model_type])[0]
    raise ConfigError(
        f"{reference} is a {saved}, which hf: does not embed.",
        f"It embeds {', '.join((*hf_towers.MODELS, *hf_vision.BACKBONES))}.",
    )
