"""Small checkpoints of BLIP and BLIP-2, as transformers saves them and as LAVIS does.

The parts of LAVIS's are built from timm, open_clip and BERT, whose names the original code has kept.
"""

from __future__ import annotations

import argparse
import re
import unicodedata
from functools import partial
from operator import itemgetter
from pathlib import Path
from typing import Any

import open_clip
import timm
import torch
import transformers
from open_clip.transformer import VisionTransformer
from timm.models.eva import Eva
from torch import nn

from tests.checkpoints import CORPUS, PATCH, SIDE, redraw, some_images
from tests.unit.encoders.inputs import CAPTIONS

WIDTH = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
QUERIES, JOINT = 4, 16


def bert_words() -> list[str]:
    """A vocabulary in BERT's form: every letter of the captions, alone and as a piece, and words."""
    letters = sorted(set(unicodedata.normalize("NFD", "".join([*CAPTIONS, *CORPUS]).lower())) - set(" \n\t"))
    words = sorted({word for line in CORPUS for word in re.findall("[a-z]+", line) if len(word) > 1})
    return ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *(f"##{letter}" for letter in letters), *words]


def save_vocabulary(folder: Path, words: list[str] | None = None) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.txt").write_text("\n".join(words or bert_words()))
    return folder / "vocab.txt"


def bert_tokenizer(folder: Path, *special: str) -> Any:
    tokens = transformers.BertTokenizer(vocab=str(save_vocabulary(folder)))
    for token in special:
        tokens.add_tokens([token], special_tokens=True)
    return tokens


def captions() -> dict[str, torch.Tensor]:
    """input_ids and attention_mask of 16 captions as different as those of tests."""
    tokens = transformers.BertTokenizer(vocab={word: at for at, word in enumerate(bert_words())})
    texts = [*CAPTIONS[:8], *CAPTIONS[13:18], *CORPUS[:3]]
    return dict(tokens(texts, padding=True, truncation=True, max_length=32, return_tensors="pt"))


def _save(folder: Path, model: Any, tokens: Any, processor: Any) -> Path:
    (folder / "vocab.txt").unlink(missing_ok=True)
    for part in (model, tokens, processor):
        part.save_pretrained(folder)
    return folder


def _processor(side: int) -> Any:
    return transformers.BlipImageProcessorPil(size={"height": side, "width": side})


# -- transformers --------------------------------------------------------------------------------


def save_blip(folder: Path, cls: str = "BlipForImageTextRetrieval", text_width: int = 32) -> Path:
    """A folder for `blip:`. text_width: other than 32, as a large BLIP has it, of another width than the vision tower."""
    tokens = bert_tokenizer(folder)
    words = {"vocab_size": len(tokens) + 2, "bos_token_id": len(tokens), "sep_token_id": 3, "layer_norm_eps": 1e-5}
    config = transformers.BlipConfig(
        text_config={**WIDTH, **words, "hidden_size": text_width},
        vision_config={**WIDTH, "image_size": SIDE, "patch_size": PATCH},
        image_text_hidden_size=JOINT,
    )
    model = getattr(transformers, cls)(config).eval()
    if cls == "BlipForImageTextRetrieval":
        redraw(model, lambda: _blip_outputs(model))
    return _save(folder, model, tokens, _processor(SIDE))


def _blip_outputs(model: Any) -> list[torch.Tensor]:
    patches = model.vision_model(pixel_values=some_images()).last_hidden_state
    ids, mask = itemgetter("input_ids", "attention_mask")(captions())
    text = model.text_encoder(ids, mask).last_hidden_state[:, 0]
    both = model.text_encoder(ids, mask, encoder_hidden_states=patches).last_hidden_state[:, 0]
    return [patches[:, 0], model.vision_proj(patches[:, 0]), text, model.text_proj(text), both, patches.mean(1)]


def blip2_config(words: int, text: bool = True) -> Any:
    return transformers.Blip2Config(
        vision_config={**WIDTH, "image_size": SIDE, "patch_size": PATCH},
        qformer_config={**WIDTH, "num_hidden_layers": 3, "vocab_size": words, "use_qformer_text_input": text},
        text_config={"model_type": "opt", "hidden_size": 32, "num_hidden_layers": 1, "ffn_dim": 64, "vocab_size": 99,
                     "num_attention_heads": 2, "word_embed_proj_dim": 32, "max_position_embeddings": 64},
        num_query_tokens=QUERIES,
        image_text_hidden_size=JOINT,
    )  # fmt: skip


def save_blip2(folder: Path) -> Path:
    """A folder for `blip2:`, Blip2ForImageTextRetrieval; its tokenizer knows `<image>`, its embeddings do not."""
    tokens = bert_tokenizer(folder, "[DEC]", "<image>")
    model: Any = transformers.Blip2ForImageTextRetrieval(blip2_config(len(tokens) - 1)).eval()
    redraw(model, lambda: _blip2_outputs(model))
    return _save(folder, model, tokens, _processor(SIDE))


def save_blip2_opt(folder: Path, shard: str = "40KB") -> Path:
    """A folder of Blip2ForConditionalGeneration on OPT, in pieces."""
    folder.mkdir(parents=True)
    model: Any = transformers.Blip2ForConditionalGeneration(blip2_config(99, text=False)).eval()
    redraw(model, lambda: [_queried(model, some_images()).mean(1)])
    model.save_pretrained(folder, max_shard_size=shard)
    _processor(SIDE).save_pretrained(folder)
    return folder


def _queried(model: Any, images: torch.Tensor) -> torch.Tensor:
    patches = model.vision_model(pixel_values=images)[0]
    queries = model.query_tokens.expand(len(images), -1, -1)
    return model.qformer(query_embeds=queries, encoder_hidden_states=patches)[0]


def _blip2_outputs(model: Any) -> list[torch.Tensor]:
    images, (ids, mask) = some_images(), itemgetter("input_ids", "attention_mask")(captions())
    hidden, queries = _queried(model, images), model.query_tokens.expand(len(images), -1, -1)
    words = model.embeddings(input_ids=ids)
    text = model.qformer(query_embeds=words, query_length=0, attention_mask=mask)[0][:, 0]
    both = model.qformer(
        query_embeds=model.embeddings(input_ids=ids, query_embeds=queries),
        query_length=QUERIES,
        attention_mask=torch.cat([mask.new_ones(len(mask), QUERIES), mask], 1),
        encoder_hidden_states=model.vision_model(pixel_values=images)[0],
    )[0][:, :QUERIES]
    projected = model.vision_projection(hidden)
    unit = nn.functional.normalize(projected, dim=-1)
    return [
        hidden.mean(1),
        hidden[:, 0],
        unit.mean(1),
        projected.mean(1),
        text,
        model.text_projection(text),
        both.mean(1),
    ]


# -- original files of BLIP ----------------------------------------------------------------------


class OriginalBlip(nn.Module):
    """BLIP_Retrieval under its own names: timm's ViT, and BERT that may look at an image."""

    def __init__(self, words: int, side: int = SIDE, width: int = 128) -> None:
        super().__init__()
        self.visual_encoder = timm.models.VisionTransformer(
            side, PATCH, num_classes=0, global_pool="", embed_dim=width, depth=2, num_heads=width // 64
        )
        shape = {**WIDTH, "hidden_size": width, "num_attention_heads": width // 64, "vocab_size": words}
        config = transformers.BertConfig(**shape, is_decoder=True, add_cross_attention=True)
        config._attn_implementation = "eager"
        self.text_encoder = transformers.BertModel(config, add_pooling_layer=False)
        self.text_encoder.config.is_decoder = False  # no causal mask, while the layers keep their cross attention
        self.vision_proj, self.text_proj = nn.Linear(width, JOINT), nn.Linear(width, JOINT)
        self.itm_head = nn.Linear(width, 2)

    def text(self, patches: torch.Tensor | None = None, **tokens: torch.Tensor) -> torch.Tensor:
        return self.text_encoder(**tokens, encoder_hidden_states=patches, use_cache=False).last_hidden_state

    def outputs(self) -> list[torch.Tensor]:
        patches = self.visual_encoder(some_images())
        tokens = {key: value for key, value in captions().items() if key != "token_type_ids"}
        text, both = self.text(**tokens)[:, 0], self.text(patches, **tokens)[:, 0]
        return [patches[:, 0], self.vision_proj(patches[:, 0]), text, self.text_proj(text), both]


def original_blip(side: int = SIDE) -> OriginalBlip:
    """Redrawn; the same at every call."""
    model = OriginalBlip(len(bert_words()) + 2, side).eval()
    types = model.text_encoder.embeddings.token_type_embeddings.weight

    def outputs() -> list[torch.Tensor]:
        types.zero_()  # BLIP's BERT has none
        return model.outputs()

    redraw(model, outputs)
    return model


def save_blip_original(file: Path) -> Path:
    """A `.pth` as a retrieval run left it: with momentum towers, queues, and its arguments."""
    state = {key: value for key, value in original_blip().state_dict().items() if "token_type" not in key}
    towers = ("visual_encoder", "text_encoder", "vision_proj", "text_proj")
    state |= {re.sub(r"^(\w+)\.", r"\1_m.", key): value * 2 for key, value in state.items() if key.startswith(towers)}
    state |= {"temp": torch.tensor(0.07), "image_queue": torch.zeros(JOINT, 8), "queue_ptr": torch.zeros(1)}
    state["text_encoder.embeddings.position_ids"] = torch.arange(512)[None]
    file.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"model": state, "epoch": 5, "args": argparse.Namespace(vit="base")}, file)
    return file


# -- LAVIS's files of BLIP-2 ---------------------------------------------------------------------


class Lavis(nn.Module):
    """Blip2Qformer's parts: a vision tower of timm or open_clip, and transformers' Q-Former for what follows it."""

    def __init__(self, vit: str, words: int) -> None:
        super().__init__()
        self.vit, self.width = vit, 88 * 2 if vit == "g" else 64 * 2
        self.visual_encoder = _eva(self.width) if vit == "g" else _clip(self.width)
        self.ln_vision = nn.LayerNorm(self.width)
        config = blip2_config(words)
        config.vision_config.hidden_size = config.qformer_config.encoder_hidden_size = self.width
        config.qformer_config.hidden_size, config.qformer_config.num_attention_heads = 128, 2
        config.vision_config.num_hidden_layers = 0
        self.rest: Any = transformers.Blip2ForImageTextRetrieval(config)
        self.rest.vision_model = nn.Identity()

    def patches(self, images: torch.Tensor) -> torch.Tensor:
        tower: Any = self.visual_encoder
        tokens = _eva_tokens(tower, images) if self.vit == "g" else _clip_tokens(tower, images)
        return self.ln_vision(tokens)

    def outputs(self) -> list[torch.Tensor]:
        self.rest.vision_model.forward = lambda pixel_values: (self.patches(pixel_values),)
        return _blip2_outputs(self.rest)


def _eva(width: int) -> nn.Module:
    return Eva(
        SIDE, PATCH, num_classes=0, global_pool="", embed_dim=width, depth=2, num_heads=width // 88, mlp_ratio=2,
        use_rot_pos_emb=False, qkv_fused=True, norm_layer=partial(nn.LayerNorm, eps=1e-6),
    )  # fmt: skip


def _eva_tokens(tower: Any, images: torch.Tensor) -> torch.Tensor:
    patches = tower.patch_embed(images)
    tokens = torch.cat([tower.cls_token.expand(len(images), -1, -1), patches], 1) + tower.pos_embed
    for block in tower.blocks:
        tokens = block(tokens)
    return tokens


def _clip(width: int) -> nn.Module:
    return VisionTransformer(
        SIDE, PATCH, width, layers=3, heads=width // 64, mlp_ratio=4.0, act_layer=open_clip.transformer.QuickGELU
    )


def _clip_tokens(tower: Any, images: torch.Tensor, layers: int | None = None) -> torch.Tensor:
    patches = tower.conv1(images).flatten(2).transpose(1, 2)
    first = tower.class_embedding.expand(len(images), 1, -1)
    tokens = tower.ln_pre(torch.cat([first, patches], 1) + tower.positional_embedding)
    for block in tower.transformer.resblocks[:layers]:
        tokens = block(tokens)
    return tokens


def lavis(vit: str) -> Lavis:
    """Redrawn; the same at every call. vit: g or L."""
    model = Lavis(vit, len(bert_words()) + 1).eval()
    redraw(model, model.outputs)
    return model


_LAVIS_NAMES = (
    (r"^embeddings\.", "Qformer.bert.embeddings."),
    (r"^qformer\.layernorm\.", "Qformer.bert.embeddings.LayerNorm."),
    (r"^qformer\.", "Qformer.bert."),
    (r"attention\.attention\.", "attention.self."),
    (r"^vision_projection\.", "vision_proj."),
    (r"^text_projection\.", "text_proj."),
)


def save_lavis(folder: Path, vit: str, apart: bool = False) -> Path:
    """LAVIS's `.pth`. apart: the vision tower, whole, in a file `vision.pth` of its own, as it is where it was frozen."""
    model = lavis(vit)
    vision = dict(model.visual_encoder.state_dict())
    unused = re.compile(r"^(norm|fc_norm|head|ln_post)\.|^proj$")
    state = {f"ln_vision.{key}": value for key, value in model.ln_vision.state_dict().items()}
    for key, value in model.rest.state_dict().items():
        for pattern, name in _LAVIS_NAMES:
            key = re.sub(pattern, name, key)
        state[key] = value
    if not apart:
        state |= {f"visual_encoder.{key}": value for key, value in vision.items() if not unused.search(key)}
    state |= {"temp": torch.tensor(0.07), "Qformer.cls.predictions.bias": torch.zeros(9)}
    state["Qformer.bert.embeddings.position_ids"] = torch.arange(512)[None]
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(
        {"model": state, "config": {"run": {"task": "image_text_pretrain"}}, "scaler": None}, folder / "blip2.pth"
    )
    if apart:
        torch.save(vision, folder / "vision.pth")
    return folder / "blip2.pth"
