"""What an encoder is: a light `EncoderSpec` on the driver, a heavy `Encoder` built from it on a worker."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from pipelines.contracts import MODALITIES, Modality, VectorSpec
from pipelines.encoders.name import EncoderName
from pipelines.encoders.text_clean import TextClean
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
    rgb: whether the image is converted to RGB before it is resized, or after it is cropped.
    library: whose rounding of sizes and crop offsets is followed, `torchvision` or `transformers`; or `tensors`,
        which are resized as floats and not rounded: pixels are [height, width, 6], whole values and then their 256ths.
    mean, std: of the three channels, applied on the device to pixels in [0, 1].
    fill: of all channels, or of each.
    """

    resize: Literal["shortest", "squash", "longest", "patches"]
    size: tuple[int, int]
    crop: tuple[int, int] | None
    resample: str
    alpha: Literal["white", "drop"]
    rgb: Literal["first", "last"]
    library: Literal["torchvision", "transformers", "tensors"]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    fill: int | tuple[int, int, int] = 0
    patch: int | None = None
    max_patches: int | None = None

    @property
    def channels(self) -> int:
        """Bytes of a pixel as it travels."""
        return 6 if self.library == "tensors" else 3


@dataclass(frozen=True)
class EncoderSpec:
    """All that decides an encoder's vectors, light enough to pickle into every task.

    name: as the user gave it. reference: leads to the same weights from any node.
    vectors: what those of each modality are. context_length: most tokens of a caption, 0 without a text tower.
    weights: digest of the weights, which the worker verifies when it loads them.
    details: what else decides a value (tokenizer digest, pooling, activation, …), JSON-able.
    projection: where the map that vectors are projected by lies; details have its digest.
    options: file system options, for weights in object storage. These two are no part of the fingerprint.
    """

    name: str
    family: str
    reference: str
    vectors: dict[Modality, VectorSpec] = field(hash=False)
    image: ImageTransform | None
    context_length: int
    weights: str
    details: dict[str, Any] = field(default_factory=dict, hash=False)
    precision: Literal["fp32", "fp16", "bf16"] = "fp32"
    normalize: bool = True
    dtype: Literal["float16", "float32"] = "float16"
    max_aspect: float = 50.0
    text_clean: TextClean = "none"
    projection: str | None = None
    options: dict[str, dict[str, Any]] = field(default_factory=dict, hash=False, repr=False)

    def identity(self) -> dict[str, Any]:
        """Everything that decides a vector's value, as plain JSON; two encoders are the same where it is."""
        fields = asdict(replace(self, options={}))
        for incidental in ("name", "reference", "projection", "options"):
            del fields[incidental]
        return dict(json.loads(json.dumps(fields)))

    @property
    def fingerprint(self) -> str:
        """64 hex digits, equal exactly where `identity()` is."""
        return hashlib.sha256(json.dumps(self.identity(), sort_keys=True).encode()).hexdigest()

    @property
    def modalities(self) -> tuple[Modality, ...]:
        return tuple(modality for modality in MODALITIES if modality in self.vectors)

    @property
    def store(self) -> Store:
        return Store(options=self.options)


@dataclass(frozen=True)
class Target:
    """An encoder of a run: its folder in `embeddings/`, the modalities asked of it, and items in one forward pass."""

    folder: str
    spec: EncoderSpec
    modalities: tuple[Modality, ...]
    batch_size: int = 64


class Tokenizer(Protocol):
    """Captions to token ids."""

    def __call__(self, captions: list[str]) -> Iterable[NDArray[np.int32]]:
        """One array a caption, of at most context_length ids: of different lengths, where the encoder masks padding."""
        ...


class Encoder(Protocol):
    """A loaded model on one device. Vectors are not yet normalised, [n, dim] or, of several an item, [n, count, dim].

    An encoder has those methods that its modalities need.
    """

    spec: EncoderSpec
    device: torch.device

    def collate(self, pixels: list[NDArray[np.uint8]]) -> dict[str, torch.Tensor]:
        """Host tensors of one batch, from uint8 [height, width, 3] arrays, to be copied to the device."""
        ...

    def images(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """From `collate`'s tensors on the device."""
        ...

    def texts(self, tokens: torch.Tensor) -> torch.Tensor:
        """From int32 [n, length] on the device, shorter captions padded with `PADDING`."""
        ...

    def pairs(self, batch: dict[str, torch.Tensor], tokens: torch.Tensor) -> torch.Tensor:
        """From images and their captions, as above, together."""
        ...


PADDING = -1
"""Behind captions that are shorter than the longest of their batch: no id of any vocabulary."""


class Family(Protocol):
    """One kind of encoder; a module of `pipelines.encoders`, listed in the registry. Its docstring says what it has."""

    EXAMPLES: tuple[str, ...]
    """Names of this family, for help and errors."""

    OPTIONS: dict[str, str]
    """What may follow the reference, as in `?pool=mean`, and what it means."""

    def describe(self, name: EncoderName, storage: dict[str, dict[str, Any]]) -> EncoderSpec:
        """The spec of a name, without loading its weights. storage: file system options by protocol.

        Raises: EncoderError, ConfigError.
        """
        ...

    def load(self, spec: EncoderSpec, device: torch.device) -> Encoder:
        """The model with exactly spec.weights. Raises: EncoderError on missing or unexpected keys."""
        ...


class TextFamily(Protocol):
    """The module of a family's tokenizers."""

    def tokenizer(self, spec: EncoderSpec) -> Tokenizer:
        """Built once in each decode worker; loads no weights."""
        ...
