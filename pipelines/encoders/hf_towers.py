"""Transformers' models of two towers: CLIP, SigLIP and SigLIP2."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from numpy.typing import NDArray

from pipelines.contracts import VectorSpec
from pipelines.encoders.base import EncoderSpec
from pipelines.encoders.batch import DTYPES, Normalize, patchify, stack, trim
from pipelines.encoders.hf_images import image_transform
from pipelines.encoders.hf_text import library_tokenizer
from pipelines.encoders.hf_weights import load_strictly
from pipelines.encoders.light_tokenizer import kept_digest
from pipelines.encoders.name import EncoderName
from pipelines.errors import ConfigError, EncoderError


@dataclass(frozen=True)
class TwoTowers:
    """What differs between the model classes.

    causal: the text tower pools at the end of the text, so that padding behind it reaches nothing;
        the others pool at the last position and were trained on text padded to the full length,
        without a mask.
    """

    cls: type[transformers.PreTrainedModel]
    dim: Callable[[Any], int]
    causal: bool


def _siglip_dim(config: Any) -> int:
    return int(getattr(config.text_config, "projection_size", None) or config.vision_config.hidden_size)


MODELS = {
    "CLIPModel": TwoTowers(transformers.CLIPModel, lambda config: int(config.projection_dim), True),
    "SiglipModel": TwoTowers(transformers.SiglipModel, _siglip_dim, False),
    "Siglip2Model": TwoTowers(transformers.Siglip2Model, _siglip_dim, False),
}
_BY_TYPE = {"clip": "CLIPModel", "siglip": "SiglipModel", "siglip2": "Siglip2Model"}


def model_class(config: Any) -> str | None:
    """A key of MODELS; None for what is none of them."""
    saved = (getattr(config, "architectures", None) or [_BY_TYPE.get(config.model_type)])[0]
    return saved if saved in MODELS else None


def described(name: EncoderName, path: Path, reference: str, config: Any) -> dict[str, Any]:
    """What of an EncoderSpec the model decides. path: of its small files. Raises: ConfigError, EncoderError."""
    model = str(model_class(config))
    if chosen := name.options.keys() & {"pool", "layer"}:
        raise ConfigError(
            f"encoder = {name.text}: a {model} has its own projection, and no {min(chosen)} to choose.",
            "Leave the option out.",
        )
    vectors = VectorSpec(MODELS[model].dim(config))
    return {
        "vectors": {"image": vectors, "text": vectors},
        "image": image_transform(path, reference),
        "context_length": int(config.text_config.max_position_embeddings),
        "details": {
            "model": model,
            "config": hashlib.sha256((path / "config.json").read_bytes()).hexdigest(),
            "tokenizer": _tokenizer_digest(path, reference, MODELS[model]),
        },
    }


def loaded(spec: EncoderSpec, device: torch.device, path: Path) -> HfEncoder:
    model = load_strictly(MODELS[spec.details["model"]].cls, path, DTYPES[spec.precision], spec.name)
    return HfEncoder(spec, device, model.to(device).eval().requires_grad_(False))


class HfEncoder:
    """A two-tower model of transformers on one device. Vectors are float32, raw."""

    def __init__(self, spec: EncoderSpec, device: torch.device, model: Any) -> None:
        assert spec.image is not None
        self.spec, self.device, self._model, self._transform = spec, device, model, spec.image
        self._normalize = Normalize(spec.image, device, DTYPES[spec.precision])
        self._causal = MODELS[spec.details["model"]].causal

    def collate(self, pixels: list[NDArray[np.uint8]]) -> dict[str, torch.Tensor]:
        return patchify(pixels, self._transform) if self._transform.resize == "patches" else stack(pixels)

    def images(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        return _vectors(self._model.get_image_features(**self._inputs(batch)))

    def _inputs(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        if self._transform.resize != "patches":
            return {"pixel_values": self._normalize.images(batch["pixels"])}
        return {
            "pixel_values": self._normalize.patches(batch["pixels"], batch["mask"]),
            "pixel_attention_mask": batch["mask"],
            "spatial_shapes": batch["grids"],
        }

    def texts(self, tokens: torch.Tensor) -> torch.Tensor:
        if self._causal:
            tokens = trim(tokens, self._pooled(tokens))
        return _vectors(self._model.get_text_features(input_ids=tokens.long()))

    def _pooled(self, tokens: torch.Tensor) -> torch.Tensor:
        """The position CLIPModel pools from; OpenAI's configurations say 2 and mean the highest id."""
        end = self._model.config.text_config.eos_token_id
        return tokens.argmax(-1) if end == 2 else tokens.eq(end).int().argmax(-1)


def _vectors(output: Any) -> torch.Tensor:
    """transformers 5 answers with a ModelOutput, whose `pooler_output` is the projected vector."""
    vectors: torch.Tensor = output if torch.is_tensor(output) else output.pooler_output
    return vectors.float()


def _tokenizer_digest(path: Path, name: str, kind: TwoTowers) -> str:
    tokens = library_tokenizer(path, name)
    if not kind.causal and tokens.padding_side != "right":
        raise EncoderError(
            f"{name}: the tokenizer pads on the {tokens.padding_side}, the model was trained on the right.",
            'Set "padding_side": "right" in its tokenizer_config.json.',
        )
    return kept_digest(tokens)
