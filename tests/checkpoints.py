"""Small checkpoints in the real formats, with random weights whose outputs spread.

Freshly initialised models give nearly the same vector for every input, and a test on them passes
anything: the parameters are drawn anew until the outputs differ by a quarter of their norm.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import open_clip
import sentencepiece
import torch
import transformers
from open_clip.tokenizer import SimpleTokenizer
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from torch import nn

SPREAD = 0.25
SIDE, PATCH, TEXT = 64, 16, 64
CORPUS = (
    "a dog runs over the green grass with a red ball in its mouth",
    "two children play near the water of a small lake at sunset",
    "un cane marrone corre sulla spiaggia, una bambina ride",
    "ein mann mit hut steht vor einem alten haus in der stadt",
    "the quick brown fox jumps over the lazy dog 0123456789 !?.,;:'&-",
)


def spread(vectors: torch.Tensor) -> float:
    """How far vectors lie from their mean, as a share of their norm."""
    vectors = vectors.detach().float()
    return float((vectors - vectors.mean(0)).norm(dim=1).mean() / vectors.norm(dim=1).mean())


def redraw(model: nn.Module, outputs: Callable[[], Iterable[torch.Tensor]], seed: int = 0) -> None:
    """Draws every parameter from a normal distribution, wider each time, until all `outputs` spread."""
    for attempt in range(20):
        generator = torch.Generator().manual_seed(seed + attempt)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                drawn = torch.randn(parameter.shape, generator=generator)
                scale = 1 if parameter.dim() > 1 else is_norm(name)
                parameter.copy_(drawn * (0.05 + 0.02 * attempt) + (1 - scale))
            if all(spread(vectors) >= SPREAD for vectors in outputs()):
                return
    raise AssertionError("no draw spreads")


def is_norm(name: str) -> int:
    """0 for the scale of a norm, which is drawn around 1."""
    return 0 if name.endswith("weight") else 1


def some_images(count: int = 16, side: int = SIDE) -> torch.Tensor:
    """float32 [count, 3, side, side]: smooth, unlike each other, in the range of normalised pixels."""
    coarse = torch.randn(count, 3, 4, 4, generator=torch.Generator().manual_seed(1))
    return nn.functional.interpolate(coarse, side, mode="bilinear") * 1.5


def some_tokens(vocabulary: int, length: int, count: int = 16, end: int | None = None) -> torch.Tensor:
    tokens = torch.randint(3, vocabulary - 3, (count, length), generator=torch.Generator().manual_seed(2))
    if end is not None:
        for row in range(count):
            tokens[row, row % (length - 2) + 2 :] = end
    return tokens


# -- open_clip -----------------------------------------------------------------------------------


def open_clip_config(quick_gelu: bool = False) -> dict[str, Any]:
    return {
        "embed_dim": 24,
        "quick_gelu": quick_gelu,
        "vision_cfg": {"image_size": SIDE, "layers": 2, "width": 64, "head_width": 32, "patch_size": PATCH},
        "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2},
    }


def save_open_clip(
    folder: Path, quick_gelu: bool = False, preprocess: dict[str, Any] | None = None, **model: Any
) -> Path:
    """A folder for `open_clip:local-dir:`, as `push_to_hf_hub` lays it out."""
    folder.mkdir(parents=True)
    config = {**open_clip_config(quick_gelu), **model}
    torch.manual_seed(0)
    built = open_clip.CLIP(**config).eval()
    side = config["vision_cfg"]["image_size"]
    images = some_images(side=max(side) if isinstance(side, list) else side)
    images = images[:, :, : side[0], : side[1]] if isinstance(side, list) else images
    tokens = some_tokens(49408, 77, end=49407)
    redraw(built, lambda: (built.encode_image(images), built.encode_text(tokens)))
    save_file(
        {key: value.contiguous() for key, value in built.state_dict().items()}, folder / "open_clip_model.safetensors"
    )
    told = {"model_cfg": config, "preprocess_cfg": preprocess or {"mean": [0.5, 0.4, 0.3], "std": [0.2, 0.3, 0.4]}}
    (folder / "open_clip_config.json").write_text(json.dumps(told))
    return folder


# -- transformers --------------------------------------------------------------------------------


def save_hf(folder: Path, kind: str) -> Path:
    """A folder for `hf:`; kind: one of HF_KINDS."""
    folder.mkdir(parents=True)
    model, tokens, processor, inputs = HF_KINDS[kind](folder)
    redraw(
        model.eval(),
        lambda: (
            model.get_image_features(**inputs["image"]).pooler_output,
            model.get_text_features(**inputs["text"]).pooler_output,
        ),
    )
    model.save_pretrained(folder)
    tokens.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def _clip(folder: Path, eos: int) -> tuple[Any, Any, Any, dict[str, Any]]:
    width = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.CLIPConfig(
        text_config={**width, "eos_token_id": eos, "bos_token_id": 49406 if eos != 2 else 0},
        vision_config={**width, "image_size": SIDE, "patch_size": PATCH},
        projection_dim=24,
    )
    processor = transformers.CLIPImageProcessorPil(
        size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE}
    )
    inputs = {
        "image": {"pixel_values": some_images()},
        "text": {"input_ids": some_tokens(49406, 77, end=49407)},
    }
    return transformers.CLIPModel(config), clip_tokenizer(folder), processor, inputs


def clip_tokenizer(folder: Path) -> Any:
    """The real vocabulary of CLIP, from the file that comes with open_clip."""
    simple = SimpleTokenizer()
    spelled = {"<start_of_text>": "<|startoftext|>", "<end_of_text>": "<|endoftext|>"}
    vocabulary = {spelled.get(token, token): index for token, index in simple.encoder.items()}
    merges = [" ".join(pair) for pair in simple.bpe_ranks]
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]))
    return transformers.CLIPTokenizer.from_pretrained(folder)


def _siglip(folder: Path) -> tuple[Any, Any, Any, dict[str, Any]]:
    tokens = sentencepiece_tokenizer(folder)
    return _siglip_with(tokens)


def _siglip2_fixed(_: Path) -> tuple[Any, Any, Any, dict[str, Any]]:
    """As the hub has SigLIP2 of fixed size: SiglipModel's type with Gemma's tokenizer."""
    return _siglip_with(gemma_tokenizer(transformers.GemmaTokenizer))


def _siglip_with(tokens: Any) -> tuple[Any, Any, Any, dict[str, Any]]:
    width = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.SiglipConfig(
        text_config={**width, "vocab_size": len(tokens), "max_position_embeddings": TEXT, "projection_size": 32},
        vision_config={**width, "image_size": SIDE, "patch_size": PATCH},
    )
    processor = transformers.SiglipImageProcessorPil(size={"height": SIDE, "width": SIDE})
    inputs = {"image": {"pixel_values": some_images()}, "text": padded(tokens)}
    return transformers.SiglipModel(config), tokens, processor, inputs


def _siglip2_naflex(_: Path) -> tuple[Any, Any, Any, dict[str, Any]]:
    tokens = gemma_tokenizer(transformers.Siglip2Tokenizer)
    width = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.Siglip2Config(
        text_config={**width, "vocab_size": len(tokens), "max_position_embeddings": TEXT, "projection_size": 32},
        vision_config={**width, "num_patches": 16, "patch_size": 8},
    )
    processor = transformers.Siglip2ImageProcessorPil(patch_size=8, max_num_patches=24, do_convert_rgb=True)
    pixels = some_images(side=32).unfold(2, 8, 8).unfold(3, 8, 8).permute(0, 2, 3, 4, 5, 1).reshape(16, 16, 192)
    image = {
        "pixel_values": pixels,
        "pixel_attention_mask": torch.ones(16, 16, dtype=torch.int32),
        "spatial_shapes": torch.full((16, 2), 4),
    }
    inputs = {"image": image, "text": padded(tokens)}
    return transformers.Siglip2Model(config), tokens, processor, inputs


def padded(tokens: Any) -> dict[str, torch.Tensor]:
    texts = [*CORPUS, "", "x", "a dog", "犬 🐕", "water " * 99]
    ids = tokens(texts, padding="max_length", truncation=True, max_length=TEXT, return_tensors="pt")["input_ids"]
    return {"input_ids": ids}


def sentencepiece_tokenizer(folder: Path) -> Any:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS * 4), model_writer=model, vocab_size=160, model_type="unigram",
        num_threads=1, pad_id=-1, bos_id=-1, eos_id=1, unk_id=2, byte_fallback=False, hard_vocab_limit=False,
        minloglevel=2,
    )  # fmt: skip
    (folder / "spiece.model").write_bytes(model.getvalue())
    return transformers.SiglipTokenizer(vocab_file=str(folder / "spiece.model"))


def gemma_tokenizer(cls: Any) -> Any:
    special = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trained = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    trained.normalizer = normalizers.Replace(" ", "▁")
    trained.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_previous")
    trained.train_from_iterator(
        CORPUS, trainers.BpeTrainer(vocab_size=500, special_tokens=special, show_progress=False)
    )
    saved = json.loads(trained.to_str())["model"]
    merges = [tuple(merge) for merge in saved["merges"]]
    return cls(vocab=saved["vocab"], merges=merges, padding_side="right", add_bos_token=False, add_eos_token=True)


HF_KINDS: dict[str, Callable[[Path], tuple[Any, Any, Any, dict[str, Any]]]] = {
    "clip-eos2": lambda folder: _clip(folder, 2),
    "clip-eos49407": lambda folder: _clip(folder, 49407),
    "siglip": _siglip,
    "siglip2-fixed": _siglip2_fixed,
    "siglip2-naflex": _siglip2_naflex,
}
