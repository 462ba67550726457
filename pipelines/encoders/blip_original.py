"""BLIP's original `.pth` files as transformers' BlipForImageTextRetrieval: architecture, from the shapes, and names."""

from __future__ import annotations

from typing import Any

import transformers

from pipelines.encoders.base import EncoderSpec
from pipelines.encoders.blip_pth import (
    POSITIONS,
    VIT_RULES,
    State,
    count,
    filled,
    parsed,
    pth,
    renamed,
    resized,
    shape,
    side_of,
)

# Towers that follow the trained ones for its losses, their queues, the captioner, and what is computed.
_DROPPED = r"^\w+_m\.|_queue$|^queue_ptr$|^temp$|^text_decoder\.|\.position_ids$"
# No file says how many heads there are; in each size one has 64 numbers.
_HEAD = 64


def in_library_names(state: State) -> State:
    return renamed(state, VIT_RULES, _DROPPED)


def architecture(state: State, name: str) -> dict[str, Any]:
    """A BlipConfig as JSON, from weights under transformers' names. The norms' epsilons are the original code's.

    Raises: EncoderError for a checkpoint without the heads for retrieval.
    """
    width, _, patch, _ = shape(state, "vision_model.embeddings.patch_embedding.weight", name)
    words, text_width = shape(state, "text_encoder.embeddings.word_embeddings.weight", name)
    side = side_of(shape(state, POSITIONS, name))
    text = {
        "vocab_size": words,
        "bos_token_id": words - 2,
        "hidden_size": text_width,
        "intermediate_size": shape(state, "text_encoder.encoder.layer.0.intermediate.dense.weight", name)[0],
        "num_hidden_layers": count(state, "text_encoder.encoder.layer"),
        "num_attention_heads": max(text_width // _HEAD, 1),
        "max_position_embeddings": shape(state, "text_encoder.embeddings.position_embeddings.weight", name)[0],
        "layer_norm_eps": 1e-12,
    }
    vision = {
        "hidden_size": width,
        "intermediate_size": shape(state, "vision_model.encoder.layers.0.mlp.fc1.weight", name)[0],
        "num_hidden_layers": count(state, "vision_model.encoder.layers"),
        "num_attention_heads": max(width // _HEAD, 1),
        "image_size": side * patch,
        "patch_size": patch,
        "layer_norm_eps": 1e-6,
    }
    joint = shape(state, "vision_proj.weight", name)[0]
    shape(state, "itm_head.weight", name)
    return {"text_config": text, "vision_config": vision, "image_text_hidden_size": joint}


def load(spec: EncoderSpec) -> Any:
    """The model at spec.image's size. Raises: EncoderError."""
    config: Any = transformers.BlipConfig(**spec.details["architecture"])
    state = in_library_names(pth(parsed(spec).reference, spec.options).state(spec.weights))
    vision = config.vision_config
    state[POSITIONS] = resized(state[POSITIONS], vision.image_size // vision.patch_size, align_corners=False)
    return filled(transformers.BlipForImageTextRetrieval, config, state, spec)
