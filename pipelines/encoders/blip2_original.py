"""LAVIS's BLIP-2 `.pth` files, on ViT-g or ViT-L, as transformers' BLIP-2: the architecture from the shapes, and names.

LAVIS leaves out of a checkpoint what was frozen in training, so that the vision tower of those that were pretrained,
and not fine-tuned, lies in a file of its own: `?vision=FILE`, eva_vit_g.pth or clip_vit_L.pth.
"""

from __future__ import annotations

import re
from typing import Any

import torch
import transformers

from pipelines.encoders.base import EncoderSpec
from pipelines.encoders.blip2_vit_l import Blip2VitL
from pipelines.encoders.blip_captions import Storage
from pipelines.encoders.blip_pth import (
    POSITIONS,
    VIT_RULES,
    Rules,
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
from pipelines.encoders.name import EncoderName
from pipelines.errors import ConfigError

_LAYERS = {"g": 39, "L": 23}
"""How many of a tower's layers LAVIS uses; those of its own file may be one more."""

_G_HEAD, _HEAD = 88, 64
_CROSS_ATTENTION_EVERY = 2
_DROPPED = r"^Qformer\.cls\.|^temp$|\.position_ids$"
# Of a tower's own file: what comes behind the layers that are used.
_DROPPED_OF_VISION = r"^(ln_post|ln_final|norm|fc_norm|head|lm_head)\.|^(proj|mask_token)$|\.relative_position_index$"

_QFORMER_RULES: Rules = (
    (r"^Qformer\.bert\.embeddings\.LayerNorm\.", "qformer.layernorm."),
    (r"^Qformer\.bert\.embeddings\.", "embeddings."),
    (r"^Qformer\.bert\.(.*)attention\.self\.", r"qformer.\1attention.attention."),
    (r"^Qformer\.bert\.", "qformer."),
    (r"^vision_proj\.", "vision_projection."),
    (r"^text_proj\.", "text_projection."),
)
_G_RULES: Rules = (*VIT_RULES, (r"^ln_vision\.", "vision_model.post_layernorm."), *_QFORMER_RULES)
_L_RULES: Rules = (
    (r"^visual_encoder\.", "vision_model."),
    (r"^ln_vision\.", "vision_model.ln_vision."),
    *_QFORMER_RULES,
)


def joined(state: State, vision: State | None) -> State:
    """A checkpoint's weights with those of the vision tower, where these come in a file of their own."""
    kept = {key: value for key, value in (vision or {}).items() if not re.search(_DROPPED_OF_VISION, key)}
    depth = _LAYERS[tower(kept, "")] if kept else 0
    used = {key: value for key, value in kept.items() if _layer(key) < depth}
    return {**state, **{f"visual_encoder.{key}": value for key, value in used.items()}}


def _layer(key: str) -> int:
    found = re.search(r"(?:resblocks|blocks)\.(\d+)\.", key)
    return int(found[1]) if found else -1


def tower(state: State, prefix: str = "visual_encoder.") -> str:
    """g or L."""
    return "L" if f"{prefix}conv1.weight" in state else "g"


def in_library_names(state: State) -> State:
    if tower(state) == "L":
        return renamed(state, _L_RULES, _DROPPED)
    return _whole_biases(renamed(state, _G_RULES, _DROPPED))


def _whole_biases(state: State) -> State:
    """ViT-g's keys have no bias, and its file none for them; transformers has one of zeros."""
    whole = dict(state)
    for key in [key for key in state if key.endswith(".self_attn.q_bias")]:
        query, value = whole.pop(key), whole.pop(key.replace("q_bias", "v_bias"))
        whole[key.replace("q_bias", "qkv.bias")] = torch.cat([query, torch.zeros_like(query), value])
    return whole


def refuse_without_tower(state: State, name: EncoderName) -> None:
    """Raises: ConfigError."""
    if not any(key.startswith("visual_encoder.") for key in state):
        width = shape(state, "ln_vision.weight", name.reference)[0]
        raise ConfigError(
            f"encoder = {name.text}: {name.reference} holds no vision tower, which LAVIS keeps in a file of its own.",
            f"Name it, as in ?vision=DIR/{'clip_vit_L.pth' if width == 1024 else 'eva_vit_g.pth'}.",
        )


def architecture(state: State, name: str) -> dict[str, Any]:
    """A Blip2Config as JSON, from weights under transformers' names. Raises: EncoderError."""
    words, width = shape(state, "embeddings.word_embeddings.weight", name)
    layer = "qformer.encoder.layer"
    qformer = {
        "vocab_size": words,
        "hidden_size": width,
        "intermediate_size": shape(state, f"{layer}.0.intermediate.dense.weight", name)[0],
        "num_hidden_layers": count(state, layer),
        "num_attention_heads": max(width // _HEAD, 1),
        "max_position_embeddings": shape(state, "embeddings.position_embeddings.weight", name)[0],
        "cross_attention_frequency": _CROSS_ATTENTION_EVERY,
        "use_qformer_text_input": True,
        "layer_norm_eps": 1e-12,
    }
    shape(state, "itm_head.weight", name)
    return {
        "vision_config": _vision_l(state, name) if _is_l(state) else _vision_g(state, name),
        "qformer_config": qformer,
        "num_query_tokens": shape(state, "query_tokens", name)[1],
        "image_text_hidden_size": shape(state, "text_projection.weight", name)[0],
    }


def _is_l(state: State) -> bool:
    return tower(state, "vision_model.") == "L"


def _vision_g(state: State, name: str) -> dict[str, Any]:
    width, _, patch, _ = shape(state, "vision_model.embeddings.patch_embedding.weight", name)
    return {
        "hidden_size": width,
        "intermediate_size": shape(state, "vision_model.encoder.layers.0.mlp.fc1.weight", name)[0],
        "num_hidden_layers": count(state, "vision_model.encoder.layers"),
        "num_attention_heads": max(width // _G_HEAD, 1),
        "image_size": side_of(shape(state, POSITIONS, name)) * patch,
        "patch_size": patch,
        "layer_norm_eps": 1e-6,
    }


def _vision_l(state: State, name: str) -> dict[str, Any]:
    width, _, patch, _ = shape(state, "vision_model.conv1.weight", name)
    return {
        "hidden_size": width,
        "num_hidden_layers": count(state, "vision_model.transformer.resblocks"),
        "num_attention_heads": max(width // _HEAD, 1),
        "image_size": side_of(shape(state, "vision_model.positional_embedding", name)) * patch,
        "patch_size": patch,
    }


def shapes(name: EncoderName, storage: Storage) -> State:
    """Of all weights, under transformers' names. Raises: ConfigError, EncoderError."""
    vision = name.options.get("vision")
    state = joined(pth(name.reference, storage).shapes(), pth(vision, storage).shapes() if vision else None)
    refuse_without_tower(state, name)
    return in_library_names(state)


def load(spec: EncoderSpec) -> Any:
    """The model at spec.image's size. Raises: EncoderError."""
    name = parsed(spec)
    config: Any = transformers.Blip2Config(**spec.details["architecture"])
    vision = name.options.get("vision")
    tower_state = pth(vision, spec.options).state(spec.details["vision"]) if vision else None
    state = in_library_names(joined(pth(name.reference, spec.options).state(spec.weights), tower_state))
    at = "vision_model.positional_embedding" if _is_l(state) else POSITIONS
    side = config.vision_config.image_size // config.vision_config.patch_size
    # LAVIS aligns the corners of ViT-L's table, and not those of ViT-g's.
    state[at] = resized(state[at], side, align_corners=_is_l(state))
    if _is_l(state):
        return filled(Blip2VitL, config, state, spec)
    model = filled(transformers.Blip2ForImageTextRetrieval, config, state, spec)
    model.vision_model.post_layernorm.eps = 1e-5  # `ln_vision`, unlike the norms inside the tower
    return model
