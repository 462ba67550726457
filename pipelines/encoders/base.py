"""What an encoder is: a light `EncoderSpec` on the driver, a heavy `Encoder` built from it on a worker."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from pipelines.contracts import Modality
from pipelines.storage import Store

if TYPE_CHECKING:
    # Seconds of import that planning and reading, which only pass specs on, do without.
    import torch


@dataclass(frozen=True)
class ImageTransform:
    """How an image becomes uint8 pixels at the encoder's size, with PIL alone, as the reference does.

    resize: `shortest` (shorter side to size, aspect kept), `squash` (to size, aspect lost),
        `longest` (longer side to size, padded with fill), `patches` (SigLIP2 NaFlex: aspect kept,
        at most max_patches patches of `patch` pixels).
    size, crop: (height, width); crop is centred, None where there is none.
    resample: PIL's filter by name, `bicubic`, `bilinear`, `nearest`, ….
    alpha: what becomes of transparency, `white` (composited on white) or `drop`.
    library: whose rounding of sizes and crop offsets is followed, `torchvision` or `transformers`.
    mean, std: of the three channels, applied on the device to pixels in [0, 1].
    """

    resize: Literal["shortest", "squash", "longest", "patches"]
    size: tuple[int, int]
    crop: tuple[int, int] | None
    resample: str
    alpha: Literal["white", "drop"]
    library: Literal["torchvision", "transformers"]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    fill: int = 0
    patch: int | None = None
    max_patches: int | None = None


@dataclass(frozen=True)
class EncoderSpec:
    """All that decides an encoder's vectors, light enough to pickle into every task.

    name: as the user gave it. reference: the part after the family's prefix.
    dim: length of a vector. context_length: tokens of a caption, 0 without a text tower.
    weights: digest of the weights, which the worker verifies when it loads them.
    details: what else decides a value (tokenizer digest, pooling, activation, …), JSON-able.
    options: file system options, for weights in object storage; no part of the fingerprint.
    """

    name: str
    family: str
    reference: str
    dim: int
    modalities: tuple[Modality, ...]
    image: ImageTransform | None
    context_length: int
    weights: str
    details: dict[str, Any] = field(default_factory=dict, hash=False)
    precision: Literal["fp32", "fp16", "bf16"] = "fp32"
    normalize: bool = True
    dtype: Literal["float16", "float32"] = "float16"
    max_aspect: float = 50.0
    options: dict[str, dict[str, Any]] = field(default_factory=dict, hash=False, repr=False)

    def identity(self) -> dict[str, Any]:
        """Everything that decides a vector's value, as plain JSON; two encoders are the same where it is."""
        fields = asdict(replace(self, options={}))
        for incidental in ("name", "reference", "options"):
            del fields[incidental]
        return dict(json.loads(json.dumps(fields)))

    @property
    def fingerprint(self) -> str:
        """64 hex digits, equal exactly where `identity()` is."""
        return hashlib.sha256(json.dumps(self.identity(), sort_keys=True).encode()).hexdigest()

    @property
    def store(self) -> Store:
        return Store(options=self.options)


class Tokenizer(Protocol):
    """Captions to token ids."""

    def __call__(self, captions: list[str]) -> NDArray[np.int32]:
        """int32 [n, context_length]."""
        ...


class Encoder(Protocol):
    """A loaded model on one device. Vectors are float32 and not yet normalised."""

    spec: EncoderSpec
    device: torch.device

    def collate(self, pixels: list[NDArray[np.uint8]]) -> dict[str, torch.Tensor]:
        """Host tensors of one batch, from uint8 [height, width, 3] arrays, to be copied to the device."""
        ...

    def images(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """float32 [n, dim] from `collate`'s tensors on the device."""
        ...

    def texts(self, tokens: torch.Tensor) -> torch.Tensor:
        """float32 [n, dim] from int32 [n, context_length] on the device."""
        ...

    def float(self) -> Encoder:
        """The same encoder computing in fp32, for rows that overflow in half precision."""
        ...


class Family(Protocol):
    """One kind of encoder; a module of `pipelines.encoders`, listed in the registry."""

    EXAMPLE: str
    """A name of this family, for help and errors."""

    def describe(self, name: str, reference: str, options: dict[str, dict[str, Any]]) -> EncoderSpec:
        """The spec of `reference`, without loading its weights. Raises: EncoderError, ConfigError."""
        ...

    def load(self, spec: EncoderSpec, device: torch.device) -> Encoder:
        """The model with exactly spec.weights. Raises: EncoderError on missing or unexpected keys."""
        ...


class TextFamily(Protocol):
    """The module of a family's tokenizers."""

    def tokenizer(self, spec: EncoderSpec) -> Tokenizer:
        """Built once in each decode worker; loads no weights."""
        ...
