"""Transformers' backbones of images alone: ViT, DINOv2 and 3, EfficientNet, ConvNeXt, Swin, ….

Classifiers and pre-training checkpoints of them are taken too, without their heads.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_MAPPING_NAMES

from pipelines.contracts import VectorSpec
from pipelines.encoders.base import EncoderSpec, ImageTransform
from pipelines.encoders.batch import DTYPES
from pipelines.encoders.hf_images import image_transform
from pipelines.encoders.hf_text import from_files
from pipelines.encoders.hf_weights import load_strictly
from pipelines.encoders.name import EncoderName
from pipelines.encoders.torch_encoder import TorchEncoder
from pipelines.errors import ConfigError, EncoderError

_Pool = Literal["cls", "mean", "pooler"]
_POOLS: dict[str, _Pool] = {"cls": "cls", "first": "cls", "mean": "mean", "pooler": "pooler"}


@dataclass(frozen=True)
class Backbone:
    """pool: what its documentation takes for the image. prefix: tokens in front of the patches', registers aside.

    pooler: False where pooler_output is no representation, but a layer for a task that training leaves out.
    """

    pool: _Pool
    prefix: int = 0
    pooler: bool = True

    @property
    def arguments(self) -> dict[str, Any]:
        """Of the model's class. One that documents its class token has a layer to be left out, or none."""
        return {} if self.pooler else {"add_pooling_layer": False}


_VIT = Backbone("cls", prefix=1, pooler=False)
_DINO = Backbone("cls", prefix=1)
_POOLED = Backbone("pooler")

BACKBONES = {
    "ViTModel": _VIT,
    "DeiTModel": Backbone("cls", prefix=2, pooler=False),
    "Dinov2Model": _DINO,
    "Dinov2WithRegistersModel": _DINO,
    "DINOv3ViTModel": _DINO,
    "DINOv3ConvNextModel": Backbone("pooler", prefix=1),
    "EfficientNetModel": Backbone("mean"),
    "BeitModel": Backbone("pooler", prefix=1),
    "SiglipVisionModel": _POOLED,
    "SwinModel": _POOLED,
    "Swinv2Model": _POOLED,
    "HieraModel": _POOLED,
    "FocalNetModel": _POOLED,
    "ConvNextModel": _POOLED,
    "ConvNextV2Model": _POOLED,
    "ResNetModel": _POOLED,
    "RegNetModel": _POOLED,
    "MobileNetV1Model": _POOLED,
}


def model_class(config: Any) -> str | None:
    """A key of BACKBONES; None for what is none of them, nor one of them with a head."""
    base = MODEL_FOR_IMAGE_MAPPING_NAMES.get(config.model_type)
    saved = getattr(transformers, _saved(config) or str(base), None)
    return base if base in BACKBONES and getattr(saved, "config_class", None) is type(config) else None


def described(name: EncoderName, path: Path, reference: str, config: Any) -> dict[str, Any]:
    """What of an EncoderSpec the model decides. path: of its small files. Raises: ConfigError, EncoderError."""
    model = str(model_class(config))
    pooling = _pooling(name, model, config)
    transform = image_transform(path, reference)
    return {
        "vectors": {"image": VectorSpec(_dim(name, model, config, transform, pooling))},
        "image": transform,
        "context_length": 0,
        "details": {
            "model": model,
            "config": hashlib.sha256((path / "config.json").read_bytes()).hexdigest(),
            "pool": pooling.pool,
            "layer": pooling.layer,
        },
    }


def loaded(spec: EncoderSpec, device: torch.device, path: Path) -> HfVisionEncoder:
    config = from_files(transformers.AutoConfig, path, spec.name)
    model = spec.details["model"]
    module = load_strictly(
        getattr(transformers, model),
        path,
        DTYPES[spec.precision],
        spec.name,
        dropped=_keys(config),
        **BACKBONES[model].arguments,
    )
    pooling = Pooling(spec.details["pool"], spec.details["layer"], _prefix(model, config))
    return HfVisionEncoder(spec, device, module, pooling)


class HfVisionEncoder(TorchEncoder):
    """A backbone of transformers on one device. Vectors are float32, raw."""

    def __init__(self, spec: EncoderSpec, device: torch.device, model: Any, pooling: Pooling) -> None:
        super().__init__(spec, device, model)
        self._pooling = pooling

    def image(self, pixels: torch.Tensor) -> torch.Tensor:
        return self._pooling.vectors(self.model, pixels)


# -- pooling -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pooling:
    """How hidden states become a vector.

    layer: which of `hidden_states`; None for the last hidden state. prefix: tokens in front of the patches'
    (class, distillation, registers), left out of a mean.
    """

    pool: _Pool
    layer: int | None
    prefix: int

    def vectors(self, model: Any, pixels: torch.Tensor) -> torch.Tensor:
        """float32 [n, dim]."""
        output = model(pixel_values=pixels, output_hidden_states=self.layer is not None)
        if self.pool == "pooler":
            return output.pooler_output.float().flatten(1)  # type: ignore[no-any-return]
        hidden = output.last_hidden_state if self.layer is None else output.hidden_states[self.layer]
        return self._pooled(hidden.float())

    def _pooled(self, hidden: torch.Tensor) -> torch.Tensor:
        """From tokens [n, length, dim] or a map [n, dim, height, width]."""
        if hidden.dim() == 4:
            if self.pool == "cls":
                raise ValueError("its hidden states are maps, without a token 0")
            return hidden.mean((2, 3))
        return hidden[:, 0] if self.pool == "cls" else hidden[:, self.prefix :].mean(1)


def _pooling(name: EncoderName, model: str, config: Any) -> Pooling:
    """As asked for, or as documented. Raises: ConfigError for what the model does not have."""
    backbone, layer = BACKBONES[model], name.integer("layer")
    default = "mean" if layer is not None and backbone.pool == "pooler" else backbone.pool
    pool = _POOLS[name.one_of("pool", _POOLS, default)]
    reason = ""
    if pool == "cls" and not backbone.prefix:
        reason = f"a {model} has no class token"
    elif pool == "pooler" and layer is not None:
        reason = "pooler_output is made from the last hidden state, whatever the layer"
    elif pool == "pooler" and not backbone.pooler:
        reason = f"the pooler of a {model} is a layer for a task it was not trained on"
    if reason:
        raise ConfigError(f"encoder = {name.text}: {reason}.", "Leave pool out, or take pool=mean.")
    return Pooling(pool, layer, _prefix(model, config))


def _prefix(model: str, config: Any) -> int:
    prefix = BACKBONES[model].prefix
    return prefix + int(getattr(config, "num_register_tokens", 0)) if prefix else 0


# -- shapes and keys without weights -------------------------------------------------------------


def _dim(name: EncoderName, model: str, config: Any, transform: ImageTransform, pooling: Pooling) -> int:
    """Of what the model makes of an image of its processor's size, computed without values."""
    height, width = transform.crop or transform.size
    with torch.device("meta"):
        module = getattr(transformers, model)(config, **BACKBONES[model].arguments).eval()
        pixels = torch.empty(1, 3, height, width)
    try:
        return int(pooling.vectors(module, pixels).shape[1])
    except IndexError:
        count = len(module(pixel_values=pixels, output_hidden_states=True).hidden_states)
        raise ConfigError(
            f"encoder = {name.text}: layer={pooling.layer}: a {model} of this size has {count} hidden states.",
            f"0 to {count - 1}, or -{count} to -1.",
        ) from None
    except Exception as error:
        raise EncoderError(
            f"{name.text}: a {model} cannot embed its image processor's {height} x {width} pixels so: {error}",
            "Leave out pool and layer, or check preprocessor_config.json against config.json.",
        ) from error


def _saved(config: Any) -> str | None:
    listed = getattr(config, "architectures", None)
    return str(listed[0]) if listed else None


def _keys(config: Any) -> frozenset[str]:
    """Of the model that was saved, its head's too."""
    saved = _saved(config)
    if saved is None:
        return frozenset()
    with torch.device("meta"):
        return frozenset(getattr(transformers, saved)(config).state_dict())
