"""timm models: `NAME`, `NAME@FILE`, `local-dir:DIR`, `hf-hub:ORG/REPO`. FILE and DIR may be URLs.

A vector is what `num_classes=0` leaves of the model, by its own pooling, of an image as its own evaluation transform
has it. https://huggingface.co/docs/timm
"""

from __future__ import annotations

from typing import Any

import timm
import torch
from timm.data.config import resolve_model_data_config

from pipelines.contracts import VectorSpec
from pipelines.encoders import weights
from pipelines.encoders.base import EncoderSpec
from pipelines.encoders.batch import DTYPES
from pipelines.encoders.name import EncoderName
from pipelines.encoders.timm_images import image_transform
from pipelines.encoders.timm_source import EXAMPLES, Source, resolve
from pipelines.encoders.timm_weights import load_strictly
from pipelines.encoders.torch_encoder import TorchEncoder
from pipelines.errors import ConfigError, EncoderError

__all__ = ["EXAMPLES", "OPTIONS", "TimmEncoder", "describe", "load"]

OPTIONS: dict[str, str] = {
    "pool": "timm's global_pool, where the model has the weights for it: avg, max, token, map, …; its own if left out"
}


def describe(name: EncoderName, storage: dict[str, dict[str, Any]]) -> EncoderSpec:
    source = resolve(name.reference, storage)
    model = _skeleton(name, source)
    data = resolve_model_data_config(model)  # type: ignore[no-untyped-call]
    return EncoderSpec(
        name=name.text,
        family="timm",
        reference=source.reference,
        vectors={"image": VectorSpec(_dim(name, model, data["input_size"]))},
        image=image_transform(data, name.text),
        context_length=0,
        weights=source.folder.digest([source.checkpoint]),
        details={
            "model": model.pretrained_cfg["architecture"],
            "arguments": source.arguments,
            "pool": name.options.get("pool") or _own_pool(model),
            "classes": model.pretrained_cfg["num_classes"],
        },
        options=storage,
    )


def load(spec: EncoderSpec, device: torch.device) -> TimmEncoder:
    source = resolve(spec.reference, spec.options)
    path = weights.fetch_verified(source.folder, source.files, [source.checkpoint], spec.weights)
    identifier, pool = source.identifier(path), spec.details["pool"]
    model = timm.create_model(identifier, num_classes=0, global_pool=pool)
    with torch.device("meta"):
        whole = timm.create_model(identifier)
    load_strictly(model, path / source.checkpoint, whole.state_dict().keys(), spec.name)
    return TimmEncoder(spec, device, model.to(DTYPES[spec.precision]))


class TimmEncoder(TorchEncoder):
    """A model of timm without its classifier on one device. Vectors are float32, raw."""

    def image(self, pixels: torch.Tensor) -> torch.Tensor:
        return self.model(pixels).float()  # type: ignore[no-any-return]


# -- without weights -----------------------------------------------------------------------------


def _skeleton(name: EncoderName, source: Source) -> Any:
    """The model without values. Raises: ConfigError for a pooling that it does not have."""
    identifier = source.identifier(source.folder.fetch(source.small) if source.small else None)
    try:
        with torch.device("meta"):
            model = timm.create_model(identifier, num_classes=0).eval()
    except Exception as error:
        raise EncoderError(
            f"{name.text}: timm cannot build it: {error}", "Check its config.json and the installed timm."
        ) from error
    pool = name.options.get("pool")
    return model if pool is None else _pooled(name, identifier, pool, model)


def _pooled(name: EncoderName, identifier: str, pool: str, own: Any) -> Any:
    try:
        with torch.device("meta"):
            model = timm.create_model(identifier, num_classes=0, global_pool=pool).eval()
    except Exception as error:
        raise ConfigError(
            f"encoder = {name.text}: the model has no pool={pool}: {error}",
            f"Its own is {_own_pool(own)}; leave the option out.",
        ) from error
    if differing := sorted(model.state_dict().keys() ^ own.state_dict().keys()):
        raise ConfigError(
            f"encoder = {name.text}: timm's pool={pool} goes with other weights than the model has: "
            f"{', '.join(differing[:4])}.",
            f"Its own is {_own_pool(own)}; leave the option out.",
        )
    return model


def _own_pool(model: Any) -> str | None:
    """What timm calls the model's pooling; None where it has no name for it."""
    for holder in (model, getattr(model, "head", None)):
        pool = getattr(holder, "global_pool", None)
        pool = pool if isinstance(pool, str) else getattr(pool, "pool_type", None)
        if isinstance(pool, str) and pool:
            return pool
    return None


def _dim(name: EncoderName, model: Any, size: tuple[int, int, int]) -> int:
    """Computed without values: `num_features` is not what comes out of some networks' heads."""
    try:
        with torch.device("meta"):
            output = model(torch.empty(1, *size))
    except Exception as error:
        raise EncoderError(f"{name.text}: it cannot embed images of its own size {size}: {error}", "") from error
    if not torch.is_tensor(output) or output.dim() != 2:
        raise EncoderError(f"{name.text}: it gives no one vector an image.", "Name a pooling, as ?pool=avg.")
    return int(output.shape[1])
