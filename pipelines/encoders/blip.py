"""BLIP for retrieval: images, captions, and images with their captions.

A hub name or folder of transformers' BlipForImageTextRetrieval, or an original `.pth` of BLIP or LAVIS. Vectors
are `?space=projected`, those of the contrastive training, or `?space=hidden`, as LAVIS's feature extractor has
them. An image with its caption has hidden vectors alone. Li et al. 2022, https://arxiv.org/abs/2201.12086
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import transformers

from pipelines.contracts import Modality, VectorSpec
from pipelines.encoders import blip_original
from pipelines.encoders.base import EncoderSpec
from pipelines.encoders.blip_captions import Storage, tokens_at
from pipelines.encoders.blip_pth import image_size, parsed, pth, transform
from pipelines.encoders.blip_source import (
    SHARED_OPTIONS,
    Source,
    file_reference,
    folder_source,
    is_file,
    load_folder,
    mean_over,
    saved_folder,
    vocabulary,
)
from pipelines.encoders.blip_text import CONTEXT_LENGTH, SPECIAL
from pipelines.encoders.hf_weights import checkpoint_files
from pipelines.encoders.name import EncoderName
from pipelines.encoders.torch_encoder import TorchEncoder
from pipelines.errors import EncoderError

EXAMPLES = ("blip:Salesforce/blip-itm-base-coco", "blip:DIR?space=hidden", "blip:FILE.pth?vocab=VOCAB.txt")
SPACES = ("projected", "hidden")
POOLS = {"projected": ("first",), "hidden": ("first", "mean")}
OPTIONS = {
    "space": "projected: compared by contrastive training; hidden: before the projection, comparable with multimodal",
    "pool": "of hidden vectors: first (the class token), or mean over all tokens; first if left out",
    **SHARED_OPTIONS,
}

_REASONS = {
    "BlipForConditionalGeneration": "which captions: it has no space that images and text share",
    "BlipForQuestionAnswering": "which answers questions: it has no space that images and text share",
    "BlipModel": "whose projections no released checkpoint holds, so that they would be random",
}


def describe(name: EncoderName, storage: Storage) -> EncoderSpec:
    space = name.one_of("space", SPACES, "projected")
    source = _of_file(name, storage) if is_file(name) else _of_folder(name, storage)
    text = source.config.text_config
    tokens = tokens_at(source.reference, SPECIAL, storage, name.text)
    added = 0 if is_file(name) else len(SPECIAL)
    return EncoderSpec(
        name=name.text,
        family="blip",
        reference=source.reference,
        vectors=_vectors(source.config, space),
        image=source.image,
        context_length=CONTEXT_LENGTH,
        weights=source.weights,
        details={
            **source.details,
            **vocabulary(tokens, text.vocab_size, added, name.text),
            "space": space,
            "pool": name.one_of("pool", POOLS[space], "first"),
            "match_token": _match_token(text, name.text),
        },
        options=storage,
    )


def load(spec: EncoderSpec, device: torch.device) -> BlipEncoder:
    file = is_file(parsed(spec))
    model = blip_original.load(spec) if file else load_folder(transformers.BlipForImageTextRetrieval, spec)
    return BlipEncoder(spec, device, model)


class BlipEncoder(TorchEncoder):
    """A BlipForImageTextRetrieval of transformers on one device. Vectors are float32."""

    def __init__(self, spec: EncoderSpec, device: torch.device, model: Any) -> None:
        super().__init__(spec, device, model)
        self._projects, self._mean = spec.details["space"] == "projected", spec.details["pool"] == "mean"

    def image(self, pixels: torch.Tensor) -> torch.Tensor:
        return self._vectors(self._patches(pixels), None, self.model.vision_proj)

    def text(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        hidden = self.model.text_encoder(input_ids=ids, attention_mask=mask).last_hidden_state
        return self._vectors(hidden, mask, self.model.text_proj)

    def pair(self, pixels: torch.Tensor, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Hidden in either space; the caption begins with [ENC] in place of [CLS], as in training and in LAVIS."""
        hidden = self._together(pixels, ids, mask)
        return mean_over(hidden, mask) if self._mean else hidden[:, 0].float()

    def match(self, pixels: torch.Tensor, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """float32 [n], how probable it is that caption and image belong together; for re-ranking.

        Begins with [ENC], as the head was trained; transformers' own `forward` leaves [CLS], and answers otherwise.
        """
        scores: torch.Tensor = self.model.itm_head(self._together(pixels, ids, mask)[:, 0])
        return scores.float().softmax(-1)[:, 1]

    def _patches(self, pixels: torch.Tensor) -> torch.Tensor:
        hidden: torch.Tensor = self.model.vision_model(pixel_values=pixels).last_hidden_state
        return hidden

    def _together(self, pixels: torch.Tensor, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        ids = ids.clone()
        ids[:, 0] = self.spec.details["match_token"]
        hidden: torch.Tensor = self.model.text_encoder(
            input_ids=ids, attention_mask=mask, encoder_hidden_states=self._patches(pixels)
        ).last_hidden_state
        return hidden

    def _vectors(self, hidden: torch.Tensor, mask: torch.Tensor | None, projection: Any) -> torch.Tensor:
        if self._projects:
            hidden = projection(hidden[:, :1])
        return mean_over(hidden, mask) if self._mean else hidden[:, 0].float()


# -- checkpoints ---------------------------------------------------------------------------------


def _of_folder(name: EncoderName, storage: Storage) -> Source:
    found = saved_folder(name, storage, _REASONS, ("BlipForImageTextRetrieval",))
    return folder_source(found, checkpoint_files(found.folder))


def _of_file(name: EncoderName, storage: Storage) -> Source:
    file = pth(name.reference, storage)
    told = blip_original.architecture(blip_original.in_library_names(file.shapes()), file.reference)
    vision = told["vision_config"]
    vision["image_size"] = image_size(name, vision["image_size"], vision["patch_size"])
    source = Source(
        reference=file_reference(file.reference, name, storage),
        cls="BlipForImageTextRetrieval",
        config=transformers.BlipConfig(**told),
        image=transform(vision["image_size"]),
        weights=file.digest,
    )
    return replace(source, details={"model": source.cls, "architecture": told})


def _vectors(config: Any, space: str) -> dict[Modality, VectorSpec]:
    """Of a large BLIP, hidden vectors of images are longer than those of text, and cannot be compared with them."""
    width, text = int(config.vision_config.hidden_size), VectorSpec(int(config.text_config.hidden_size), "hidden")
    if space == "projected":
        joint = VectorSpec(int(config.image_text_hidden_size), "projected")
        return {"image": joint, "text": joint, "multimodal": text}
    image = text if width == text.dim else VectorSpec(width, "hidden-image")
    return {"image": image, "text": text, "multimodal": text}


def _match_token(text: Any, name: str) -> int:
    """[ENC], which the model knows and transformers' tokenizer does not: next to [DEC], the first it was taught."""
    token = int(text.bos_token_id) + 1
    if token >= text.vocab_size:
        raise EncoderError(
            f"{name}: a bos_token_id of {token - 1} leaves no room for [ENC] in its {text.vocab_size} words.",
            "Correct the text_config of its config.json: bos_token_id is the id of [DEC], 30522 in BERT's vocabulary.",
        )
    return token
