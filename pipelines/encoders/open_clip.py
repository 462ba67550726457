"""open_clip models: `ARCH/TAG`, `ARCH@FILE`, `local-dir:DIR`, `hf-hub:ORG/REPO`. FILE and DIR may be URLs.

https://github.com/mlfoundations/open_clip; half precision is its own `fp16` and `bf16`, which keep
the layer norms in fp32.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import torch
import transformers.dynamic_module_utils
from numpy.typing import NDArray
from safetensors import safe_open

from pipelines.contracts import VectorSpec
from pipelines.encoders import weights
from pipelines.encoders.base import EncoderSpec, ImageTransform
from pipelines.encoders.batch import DTYPES, Normalize, stack, trim
from pipelines.encoders.name import EncoderName
from pipelines.encoders.open_clip_source import EXAMPLES, resolve
from pipelines.encoders.open_clip_text import library_tokenizer, tokenizer_digest
from pipelines.errors import EncoderError

__all__ = ["EXAMPLES", "OPTIONS", "OpenClipEncoder", "describe", "load"]

_POSITIONS = ("visual.positional_embedding", "positional_embedding", "text.positional_embedding")

_EncodeText = Callable[[torch.Tensor], torch.Tensor]


OPTIONS: dict[str, str] = {}


def describe(name: EncoderName, storage: dict[str, dict[str, Any]]) -> EncoderSpec:
    source = resolve(name.reference, storage)
    if source.arch is None:
        source.folder.fetch(weights.small(source.folder.names()))
    text = source.model["text_cfg"]
    vectors = VectorSpec(int(source.model["embed_dim"]))
    spec = EncoderSpec(
        name=name.text,
        family="open_clip",
        reference=source.reference,
        vectors={"image": vectors, "text": vectors},
        image=_transform(source.model, source.preprocess),
        context_length=int(text.get("context_length", 77)),
        weights=source.folder.digest([source.checkpoint]),
        details={"model": source.model},
        options=storage,
    )
    return replace(spec, details={**spec.details, "tokenizer": tokenizer_digest(library_tokenizer(source))})


def load(spec: EncoderSpec, device: torch.device) -> OpenClipEncoder:
    source = resolve(spec.reference, spec.options)
    path = weights.fetch_verified(source.folder, source.files, [source.checkpoint], spec.weights)
    if source.model["text_cfg"].get("hf_model_name"):
        # The time in which transformers, through open_clip, would ask whether to run code that comes with the model.
        transformers.dynamic_module_utils.TIME_OUT_REMOTE_CODE = 0
    try:
        with warnings.catch_warnings(action="ignore"):
            model = open_clip.create_model(
                source.identifier(path),
                pretrained=str(path / source.checkpoint) if source.arch else None,
                precision=spec.precision,
                device=device,
                require_pretrained=True,
                weights_only=True,
            )
    except Exception as error:
        raise EncoderError(
            f"{spec.name}: the weights are not those of the model: {error}",
            "Name the architecture the checkpoint was trained with, or repair the checkpoint.",
        ) from error
    _refuse_resized(model, path / source.checkpoint, spec.name)
    return OpenClipEncoder(spec, device, model.eval().requires_grad_(False))


class OpenClipEncoder:
    """A CLIP, CustomTextCLIP or CoCa of open_clip on one device. Vectors are float32, raw."""

    def __init__(self, spec: EncoderSpec, device: torch.device, model: Any) -> None:
        assert spec.image is not None
        self.spec, self.device, self._model = spec, device, model
        self._normalize = Normalize(spec.image, device, DTYPES[spec.precision])
        self._encode_text = _causal_text(model) or _TextTower(model)

    def collate(self, pixels: list[NDArray[np.uint8]]) -> dict[str, torch.Tensor]:
        return stack(pixels)

    def images(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        images = self._normalize.images(batch["pixels"])
        vectors: torch.Tensor = self._model.encode_image(images, normalize=False)
        return vectors.float()

    def texts(self, tokens: torch.Tensor) -> torch.Tensor:
        return self._encode_text(tokens.long()).float()


class _TextTower(torch.nn.Module):
    """`encode_text` as a module's forward, for `functional_call`."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        vectors: torch.Tensor = self.model.encode_text(tokens, normalize=False)
        return vectors


def _causal_text(model: Any) -> _EncodeText | None:
    """`encode_text` on the batch's longest caption alone, with the library's own code on shortened tables.

    None where the tail could reach the pooled position: bidirectional, last or class token pooling.
    """
    clip = type(model) is open_clip.CLIP
    tower: Any = model if clip else getattr(model, "text", None)
    pool = getattr(tower, "text_pool_type" if clip else "pool_type", None)
    end: Any = getattr(tower, "text_eos_id" if clip else "eos_id", None)
    mask = getattr(tower, "attn_mask", None)
    if mask is None or pool not in ("argmax", "eos") or getattr(tower, "cls_emb", None) is not None:
        return None
    prefix, positions = "model." if clip else "model.text.", tower.positional_embedding
    module = _TextTower(model)

    def encode(tokens: torch.Tensor) -> torch.Tensor:
        pooled = tokens.argmax(-1) if pool == "argmax" else tokens.eq(end).int().argmax(-1)
        tokens = trim(tokens, pooled)
        length = tokens.shape[1]
        tables = {
            f"{prefix}positional_embedding": positions[:length],
            f"{prefix}attn_mask": mask[:length, :length],
        }
        return torch.func.functional_call(module, tables, (tokens,))  # type: ignore[no-any-return]

    return encode


# -- images and text -----------------------------------------------------------------------------


def _transform(model: dict[str, Any], preprocess: dict[str, Any]) -> ImageTransform:
    """As `open_clip.transform.image_transform` reads a preprocessing configuration."""
    cfg = open_clip.transform.PreprocessCfg(
        **open_clip.transform.merge_preprocess_dict(open_clip.transform.PreprocessCfg(), preprocess)
    )
    height, width = _pair(model["vision_cfg"].get("image_size", 224))
    resize: Any = cfg.resize_mode or "shortest"
    # open_clip resizes to a shape that is not square by bicubic, whatever the configuration says.
    bilinear = cfg.interpolation == "bilinear" and not (resize == "shortest" and height != width)
    return ImageTransform(
        resize=resize,
        size=(height, width),
        crop=None if resize == "squash" else (height, width),
        resample="bilinear" if bilinear else "bicubic",
        alpha="drop",
        rgb="last",
        library="torchvision",
        mean=_triple(cfg.mean),
        std=_triple(cfg.std),
        fill=int(cfg.fill_color) if resize == "longest" else 0,
    )


def _pair(size: Any) -> tuple[int, int]:
    return (int(size), int(size)) if isinstance(size, int) else (int(size[0]), int(size[1]))


def _triple(value: Any) -> tuple[float, float, float]:
    red, green, blue = value if isinstance(value, list | tuple) else (value,) * 3
    return float(red), float(green), float(blue)


def _refuse_resized(model: torch.nn.Module, checkpoint: Path, name: str) -> None:
    """open_clip interpolates a position table of another size, so that the wrong architecture loads."""
    own, saved = {key: value.shape for key, value in model.state_dict().items()}, _shapes(checkpoint)
    own.setdefault("positional_embedding", own.get("text.positional_embedding"))  # as older checkpoints have it
    wrong = [
        f"{key} {list(saved[key])}, not {list(own[key])}"
        for key in _POSITIONS
        if own.get(key) and key in saved and own[key] != saved[key]
    ]
    if wrong:
        raise EncoderError(f"{name}: the weights are not those of the model: {'; '.join(wrong)}.", "Name its own size.")


def _shapes(checkpoint: Path) -> dict[str, torch.Size]:
    """Of a checkpoint's tensors, without reading them."""
    if checkpoint.suffix in (".npz", ".npy"):
        return {}
    if checkpoint.suffix == ".safetensors":
        with safe_open(checkpoint, "pt") as file:
            return {key: torch.Size(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
    state = torch.load(checkpoint, map_location="meta", weights_only=True)
    state = state.get("state_dict", state)
    return {key.removeprefix("module."): value.shape for key, value in state.items()}
