"""Transformers' CLIP, SigLIP and SigLIP2: a hub name with `@revision`, a folder, or a folder in object storage.

Images as the `pil` backend of the image processors has them. https://huggingface.co/docs/transformers
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import transformers
from numpy.typing import NDArray
from PIL import Image

from pipelines.encoders import weights
from pipelines.encoders.base import EncoderSpec, ImageTransform
from pipelines.encoders.batch import DTYPES, Normalize, patchify, stack, trim
from pipelines.encoders.digest import vocabulary_digest
from pipelines.encoders.hf_text import from_files, library_tokenizer
from pipelines.errors import ConfigError, EncoderError

EXAMPLE = "hf:google/siglip2-base-patch16-224"

# Of buffers that old checkpoints saved and today's classes compute.
_DERIVED = re.compile(r"\.position_ids$")


@dataclass(frozen=True)
class _Kind:
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


_KINDS = {
    "CLIPModel": _Kind(transformers.CLIPModel, lambda config: int(config.projection_dim), True),
    "SiglipModel": _Kind(transformers.SiglipModel, _siglip_dim, False),
    "Siglip2Model": _Kind(transformers.Siglip2Model, _siglip_dim, False),
}
_BY_TYPE = {"clip": "CLIPModel", "siglip": "SiglipModel", "siglip2": "Siglip2Model"}


def describe(name: str, reference: str, options: dict[str, dict[str, Any]]) -> EncoderSpec:
    folder = weights.folder(reference, options)
    names = folder.names()
    if "config.json" not in names:
        raise EncoderError(f"{folder.reference} holds no config.json.", f"There: {', '.join(names) or 'nothing'}.")
    path = folder.fetch(weights.small(names))
    config = from_files(transformers.AutoConfig, path, folder.reference)
    model = _model_class(config, folder.reference)
    return EncoderSpec(
        name=name,
        family="hf",
        reference=folder.reference,
        dim=_KINDS[model].dim(config),
        modalities=("image", "text"),
        image=_transform(path, folder.reference),
        context_length=int(config.text_config.max_position_embeddings),
        weights=folder.digest(_checkpoint(folder)),
        details={
            "model": model,
            "config": hashlib.sha256((path / "config.json").read_bytes()).hexdigest(),
            "tokenizer": _tokenizer_digest(path, folder.reference, _KINDS[model]),
        },
        options=options,
    )


def load(spec: EncoderSpec, device: torch.device) -> HfEncoder:
    folder = weights.folder(spec.reference, spec.options)
    checkpoint = _checkpoint(folder)
    files = [*checkpoint, *weights.small(folder.names())]
    path = weights.fetch_verified(folder, files, checkpoint, spec.weights)
    model = _load_strictly(_KINDS[spec.details["model"]].cls, path, DTYPES[spec.precision], spec.name)
    return HfEncoder(spec, device, model.to(device).eval().requires_grad_(False))


class HfEncoder:
    """A two-tower model of transformers on one device. Vectors are float32, raw."""

    def __init__(self, spec: EncoderSpec, device: torch.device, model: Any) -> None:
        assert spec.image is not None
        self.spec, self.device, self._model, self._transform = spec, device, model, spec.image
        self._normalize = Normalize(spec.image, device, DTYPES[spec.precision])
        self._causal = _KINDS[spec.details["model"]].causal

    def collate(self, pixels: list[NDArray[np.uint8]]) -> dict[str, torch.Tensor]:
        return patchify(pixels, self._transform) if self._transform.resize == "patches" else stack(pixels)

    @torch.inference_mode()
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

    @torch.inference_mode()
    def texts(self, tokens: torch.Tensor) -> torch.Tensor:
        if self._causal:
            tokens = trim(tokens, self._pooled(tokens))
        return _vectors(self._model.get_text_features(input_ids=tokens.long()))

    def _pooled(self, tokens: torch.Tensor) -> torch.Tensor:
        """The position CLIPModel pools from; OpenAI's configurations say 2 and mean the highest id."""
        end = self._model.config.text_config.eos_token_id
        return tokens.argmax(-1) if end == 2 else tokens.eq(end).int().argmax(-1)

    def float(self) -> HfEncoder:
        return load(replace(self.spec, precision="fp32"), self.device)


def _vectors(output: Any) -> torch.Tensor:
    """transformers 5 answers with a ModelOutput, whose `pooler_output` is the projected vector."""
    vectors: torch.Tensor = output if torch.is_tensor(output) else output.pooler_output
    return vectors.float()


# -- checkpoints ---------------------------------------------------------------------------------


def _model_class(config: Any, reference: str) -> str:
    """By the class that was saved; the model type alone also names towers and classifiers."""
    saved = (getattr(config, "architectures", None) or [_BY_TYPE.get(config.model_type)])[0]
    if saved not in _KINDS:
        raise ConfigError(
            f"{reference} is a {saved or config.model_type}, which hf: does not embed.",
            f"It embeds {', '.join(_KINDS)}.",
        )
    return str(saved)


def _checkpoint(folder: weights.Folder) -> list[str]:
    """The weight files `from_pretrained` reads: safetensors first, whole or in pieces."""
    names = folder.names()
    for whole in ("model.safetensors", "pytorch_model.bin"):
        if whole in names:
            return [whole]
        index = f"{whole}.index.json"
        if index in names:
            pieces = set(json.loads((folder.fetch([index]) / index).read_text())["weight_map"].values())
            if elsewhere := sorted(pieces - set(names)):
                raise EncoderError(
                    f"{folder.reference} lacks {elsewhere[0]}, which its {index} names.", "Fetch it too."
                )
            return sorted(pieces)
    raise EncoderError(
        f"{folder.reference} holds no model.safetensors or pytorch_model.bin.", f"There: {', '.join(names)}."
    )


def _load_strictly(cls: Any, path: Path, dtype: torch.dtype, name: str) -> Any:
    # Mismatched sizes are ignored by the library only, so as to be listed here with all else that is wrong.
    how: dict[str, Any] = {"dtype": dtype, "local_files_only": True, "ignore_mismatched_sizes": True}
    how |= {"weights_only": True, "trust_remote_code": False}
    try:
        model, info = cls.from_pretrained(path, output_loading_info=True, **how)
    except Exception as error:
        raise EncoderError(f"{name}: cannot be loaded: {error}", "Repair or replace the checkpoint.") from error
    wrong = {
        problem: sorted(str(key) for key in info.get(problem) or () if not _DERIVED.search(str(key)))
        for problem in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs")
    }
    if any(wrong.values()):
        told = "; ".join(f"{problem.replace('_', ' ')}: {', '.join(keys)}" for problem, keys in wrong.items() if keys)
        raise EncoderError(f"{name}: the weights are not those of a {cls.__name__}: {told}.", "Repair the checkpoint.")
    return model


def _tokenizer_digest(path: Path, name: str, kind: _Kind) -> str:
    tokens = library_tokenizer(path, name)
    if not kind.causal and tokens.padding_side != "right":
        raise EncoderError(
            f"{name}: the tokenizer pads on the {tokens.padding_side}, the model was trained on the right.",
            'Set "padding_side": "right" in its tokenizer_config.json.',
        )
    return vocabulary_digest(tokens)


# -- images --------------------------------------------------------------------------------------


def _transform(path: Path, name: str) -> ImageTransform:
    """From the checkpoint's own image processor. Raises: EncoderError where it does something else too."""
    processor = from_files(transformers.AutoImageProcessor, path, name, backend="pil")
    resize, size, crop = _geometry(processor, name)
    plain = processor.do_rescale and processor.do_normalize and not getattr(processor, "do_pad", False)
    if not plain or abs(processor.rescale_factor * 255 - 1) > 1e-6:
        raise EncoderError(f"{name}: its image processor pads, or does not rescale by 1/255 and normalise.", "")
    patches = resize == "patches"
    return ImageTransform(
        resize=resize,
        size=size,
        crop=crop,
        resample=Image.Resampling(processor.resample).name.lower(),
        alpha="white",
        library="transformers",
        mean=tuple(processor.image_mean),
        std=tuple(processor.image_std),
        patch=int(processor.patch_size) if patches else None,
        max_patches=int(processor.max_num_patches) if patches else None,
    )


_Geometry = tuple[Literal["shortest", "squash", "patches"], tuple[int, int], tuple[int, int] | None]


def _geometry(processor: Any, name: str) -> _Geometry:
    if hasattr(processor, "max_num_patches"):
        side = int(processor.patch_size * processor.max_num_patches**0.5)
        return "patches", (side, side), None
    size, crop = processor.size, processor.crop_size if getattr(processor, "do_center_crop", False) else None
    cropped = (int(crop.height), int(crop.width)) if crop else None
    if processor.do_resize and getattr(size, "shortest_edge", None) and not getattr(size, "longest_edge", None):
        return "shortest", (int(size.shortest_edge), int(size.shortest_edge)), cropped
    if processor.do_resize and getattr(size, "height", None) and getattr(size, "width", None):
        return "squash", (int(size.height), int(size.width)), cropped
    raise EncoderError(f"{name}: an image processor of size {size} is not known.", "Use a CLIP or SigLIP checkpoint.")
