"""BLIP-2: images, captions, and images with their captions.

A hub name or folder of transformers' Blip2ForImageTextRetrieval; LAVIS's `.pth` files on ViT-g and ViT-L; and, of
images alone, the Q-Former of models that were trained on to write text (Blip2ForConditionalGeneration), whose vectors
cannot be compared with those of any text. BLIP-2 has 32 vectors an image: `?pool=` says what becomes of them. Its own
measure is the highest similarity of any of them, `?pool=tokens`. Li et al. 2023, https://arxiv.org/abs/2301.12597
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import transformers

from pipelines.contracts import Modality, VectorSpec
from pipelines.encoders import blip2_original, blip2_queries
from pipelines.encoders.base import EncoderSpec
from pipelines.encoders.blip2_text import CONTEXT_LENGTH, SPECIAL
from pipelines.encoders.blip_captions import Storage, tokens_at
from pipelines.encoders.blip_pth import image_size, parsed, pth, transform
from pipelines.encoders.blip_source import (
    SHARED_OPTIONS,
    Source,
    file_reference,
    folder_source,
    is_file,
    load_folder,
    saved_folder,
    vocabulary,
)
from pipelines.encoders.hf_weights import checkpoint_files
from pipelines.encoders.name import EncoderName
from pipelines.encoders.torch_encoder import TorchEncoder

EXAMPLES = (
    "blip2:Salesforce/blip2-itm-vit-g",
    "blip2:Salesforce/blip2-itm-vit-g-coco?pool=tokens",
    "blip2:Salesforce/blip2-opt-2.7b",
    "blip2:blip2_pretrained_vitL.pth?vision=clip_vit_L.pth&vocab=VOCAB.txt",
)
POOLS = {"projected": ("mean_norm", "mean_raw", "first", "tokens"), "hidden": ("mean_raw", "first")}
SPACES = tuple(POOLS)
OPTIONS = {
    "space": "projected: compared by contrastive training; hidden: the Q-Former's own, comparable with multimodal",
    "pool": "of an image's vectors: mean_norm (each of unit length, then averaged; if left out), mean_raw (averaged as "
    "they are; if left out, of hidden ones), first, or tokens (all, compared by the highest similarity)",
    "vision": "of a .pth that holds no vision tower: the file that does, eva_vit_g.pth or clip_vit_L.pth",
    **SHARED_OPTIONS,
}

_RETRIEVAL, _WRITERS = "Blip2ForImageTextRetrieval", ("Blip2ForConditionalGeneration", "Blip2Model")
_REASONS = {
    "Blip2VisionModelWithProjection": "which has no text tower",
    "Blip2TextModelWithProjection": "which has no vision tower",
}


def describe(name: EncoderName, storage: Storage) -> EncoderSpec:
    source = _of_file(name, storage) if is_file(name) else _of_folder(name, storage)
    writer = source.cls in _WRITERS
    space = name.one_of("space", ("hidden",) if writer else SPACES, "hidden" if writer else "projected")
    spec = EncoderSpec(
        name=name.text,
        family="blip2",
        reference=source.reference,
        vectors={},
        image=source.image,
        context_length=0,
        weights=source.weights,
        details={**source.details, "space": space, "pool": name.one_of("pool", POOLS[space], POOLS[space][0])},
        options=storage,
    )
    return _of_images(spec, source.config) if writer else _of_both(spec, source.config, name)


def load(spec: EncoderSpec, device: torch.device) -> Blip2Encoder:
    return Blip2Encoder(spec, device, _model(spec))


def _model(spec: EncoderSpec) -> Any:
    if is_file(parsed(spec)):
        return blip2_original.load(spec)
    if spec.details["model"] == _RETRIEVAL:
        return load_folder(transformers.Blip2ForImageTextRetrieval, spec)
    return blip2_queries.load(spec)


def _unit_mean(vectors: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.normalize(vectors, dim=-1).mean(1)


_POOLED: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "mean_norm": _unit_mean,
    "mean_raw": lambda vectors: vectors.mean(1),
    "first": lambda vectors: vectors[:, 0],
    "tokens": lambda vectors: vectors,
}


class Blip2Encoder(TorchEncoder):
    """A BLIP-2 on one device. Vectors are float32; in fp16 the Q-Former stays in fp32, as in both libraries."""

    def __init__(self, spec: EncoderSpec, device: torch.device, model: Any) -> None:
        super().__init__(spec, device, model)
        self._projects = spec.details["space"] == "projected"
        self._pool = _POOLED[spec.details["pool"]]

    def image(self, pixels: torch.Tensor) -> torch.Tensor:
        """[n, dim], or of pool=tokens [n, count, dim]."""
        patches = self._patches(pixels)
        hidden = self.model.qformer(query_embeds=self._queries(len(patches)), encoder_hidden_states=patches)[0]
        return self._pool((self._projected(hidden, self.model.vision_projection) if self._projects else hidden).float())

    def text(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        words = self.model.embeddings(input_ids=ids)
        first = self.model.qformer(query_embeds=words, query_length=0, attention_mask=mask)[0][:, 0]
        return (self._projected(first, self.model.text_projection) if self._projects else first).float()

    def pair(self, pixels: torch.Tensor, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Hidden in either space, of the queries that saw both; averaged where space is projected."""
        hidden = self._together(pixels, ids, mask).float()
        return hidden.mean(1) if self._projects else self._pool(hidden)

    def match(self, pixels: torch.Tensor, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """float32 [n], how probable it is that caption and image belong together; for re-ranking."""
        scores = self._projected(self._together(pixels, ids, mask), self.model.itm_head)
        return scores.float().mean(1).softmax(-1)[:, 1]

    def _patches(self, pixels: torch.Tensor) -> torch.Tensor:
        patches: torch.Tensor = self.model.vision_model(pixel_values=pixels)[0]
        return patches

    def _queries(self, items: int) -> torch.Tensor:
        queries: torch.Tensor = self.model.query_tokens.expand(items, -1, -1)
        return queries

    def _projected(self, hidden: torch.Tensor, projection: Any) -> torch.Tensor:
        vectors: torch.Tensor = projection(hidden.to(projection.weight.dtype))
        return vectors

    def _together(self, pixels: torch.Tensor, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """[n, queries, width]: the queries' outputs."""
        queries = self._queries(len(ids))
        count = queries.shape[1]
        hidden: torch.Tensor = self.model.qformer(
            query_embeds=self.model.embeddings(input_ids=ids, query_embeds=queries),
            query_length=count,
            attention_mask=torch.cat([mask.new_ones(len(mask), count), mask], 1),
            encoder_hidden_states=self._patches(pixels),
        )[0]
        return hidden[:, :count]


# -- checkpoints ---------------------------------------------------------------------------------


def _of_folder(name: EncoderName, storage: Storage) -> Source:
    found = saved_folder(name, storage, _REASONS, (_RETRIEVAL, *_WRITERS))
    files = checkpoint_files(found.folder) if found.cls == _RETRIEVAL else blip2_queries.needed_files(found.folder)
    return folder_source(found, files)


def _of_file(name: EncoderName, storage: Storage) -> Source:
    file = pth(name.reference, storage)
    told = blip2_original.architecture(blip2_original.shapes(name, storage), file.reference)
    vision = told["vision_config"]
    vision["image_size"] = image_size(name, vision["image_size"], vision["patch_size"])
    tower = pth(name.options["vision"], storage) if "vision" in name.options else None
    source = Source(
        reference=file_reference(file.reference, name, storage, **({"vision": tower.reference} if tower else {})),
        cls=_RETRIEVAL,
        config=transformers.Blip2Config(**told),
        image=transform(vision["image_size"]),
        weights=file.digest,
    )
    details = {"model": f"LAVIS {_RETRIEVAL}", "architecture": told, "vision": tower.digest if tower else None}
    return replace(source, details=details)


def _of_both(spec: EncoderSpec, config: Any, name: EncoderName) -> EncoderSpec:
    tokens = tokens_at(spec.reference, SPECIAL, spec.options, spec.name)
    words = vocabulary(tokens, config.qformer_config.vocab_size, 0, spec.name)
    return replace(
        spec,
        vectors=_vectors(config, spec.details["space"], spec.details["pool"]),
        context_length=CONTEXT_LENGTH,
        details={**spec.details, **words},
    )


def _vectors(config: Any, space: str, pool: str) -> dict[Modality, VectorSpec]:
    hidden = VectorSpec(int(config.qformer_config.hidden_size), "hidden")
    if space == "hidden":
        return {"image": hidden, "text": hidden, "multimodal": hidden}
    joint = VectorSpec(int(config.image_text_hidden_size), "projected")
    image = replace(joint, count=int(config.num_query_tokens)) if pool == "tokens" else joint
    return {"image": image, "text": joint, "multimodal": hidden}


def _of_images(spec: EncoderSpec, config: Any) -> EncoderSpec:
    """Queries that were trained on to speak to a language model, in a space of that model's own."""
    vectors = VectorSpec(int(config.qformer_config.hidden_size), f"qformer-{config.text_config.model_type}")
    return replace(spec, vectors={"image": vectors})
