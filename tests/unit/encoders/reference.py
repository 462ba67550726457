"""The reference libraries used as their manuals show, one image and one caption at a time."""

from __future__ import annotations

import io
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import open_clip
import torch
import transformers
from PIL import Image, ImageOps

from pipelines.decode import open_image
from pipelines.encoders.base import Encoder, EncoderSpec
from pipelines.encoders.batch import padded
from pipelines.encoders.pixels import to_pixels


def opened(data: bytes) -> Image.Image:
    """Upright; 16 bits scaled down, which the libraries would clip to white."""
    image = Image.open(io.BytesIO(data))
    image.load()
    image = ImageOps.exif_transpose(image)
    if image.mode == "I;16":
        image = Image.fromarray((np.array(image) // 256).astype("uint8"), "L")
    return image


def error(ours: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """Of each row, as a share of how far the reference's rows lie from their mean."""
    return np.linalg.norm(ours - reference, axis=1) / spread(reference)


def spread(vectors: np.ndarray) -> float:
    return float(np.linalg.norm(vectors - vectors.mean(0), axis=1).mean())


class OpenClipReference:
    def __init__(self, name: str, **options: Any) -> None:
        where = name.removeprefix("open_clip:")
        self.model, _, self.preprocess = open_clip.create_model_and_transforms(where, **options)
        self.model.eval()
        self.tokenizer = open_clip.get_tokenizer(where)

    @torch.no_grad()
    def image(self, data: bytes) -> np.ndarray:
        return self.model.encode_image(self.preprocess(opened(data)).unsqueeze(0))[0].numpy()

    @torch.no_grad()
    def text(self, caption: str) -> np.ndarray:
        return self.model.encode_text(self.tokenizer([caption]))[0].numpy()


class HfReference:
    def __init__(self, name: str) -> None:
        folder = name.removeprefix("hf:")
        self.processor = transformers.AutoImageProcessor.from_pretrained(folder, backend="pil")
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        self.model = transformers.AutoModel.from_pretrained(folder, dtype=torch.float32).eval()

    @torch.no_grad()
    def image(self, data: bytes) -> np.ndarray:
        inputs = self.processor(images=opened(data), return_tensors="pt")
        return self.model.get_image_features(**inputs).pooler_output[0].numpy()

    @torch.no_grad()
    def text(self, caption: str) -> np.ndarray:
        if isinstance(self.model, transformers.CLIPModel):
            inputs = self.tokenizer([caption], truncation=True, max_length=77, return_tensors="pt")
            return self.model.get_text_features(**inputs).pooler_output[0].numpy()
        inputs = self.tokenizer([caption], padding="max_length", truncation=True, max_length=64, return_tensors="pt")
        return self.model.get_text_features(input_ids=inputs["input_ids"]).pooler_output[0].numpy()


def reference(name: str) -> OpenClipReference | HfReference:
    return HfReference(name) if name.startswith("hf:") else OpenClipReference(name)


# -- ours, in batches ----------------------------------------------------------------------------


@torch.inference_mode()
def our_images(encoder: Encoder, images: Sequence[bytes], batch: int = 7) -> np.ndarray:
    """Through the pipeline's own steps: open, to_pixels, collate, images."""
    pixels = our_pixels(encoder.spec, images)
    return joined(encoder.images(encoder.collate(pixels[at : at + batch])) for at in range(0, len(pixels), batch))


@torch.inference_mode()
def our_texts(encoder: Encoder, tokens: Sequence[np.ndarray], batch: int = 5) -> np.ndarray:
    """tokens: as the tokenizer gives them."""
    longest = encoder.spec.context_length
    return joined(encoder.texts(padded(list(tokens[at : at + batch]), longest)) for at in range(0, len(tokens), batch))


@torch.inference_mode()
def our_pairs(encoder: Encoder, images: Sequence[bytes], tokens: Sequence[np.ndarray], batch: int = 5) -> np.ndarray:
    """Of each image with the caption at its position."""
    pixels, longest = our_pixels(encoder.spec, images), encoder.spec.context_length
    return joined(
        encoder.pairs(encoder.collate(pixels[at : at + batch]), padded(list(tokens[at : at + batch]), longest))
        for at in range(0, len(pixels), batch)
    )


def our_pixels(spec: EncoderSpec, images: Sequence[bytes]) -> list[np.ndarray]:
    return [to_pixels(open_image(data, 10**8), spec.image, spec.max_aspect) for data in images]


def joined(batches: Iterable[torch.Tensor]) -> np.ndarray:
    return np.concatenate([batch.float().numpy() for batch in batches])
