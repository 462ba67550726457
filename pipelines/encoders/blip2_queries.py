"""Vision tower and Q-Former of a BLIP-2 that was trained on to write text, without its language model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import safe_open
from torch import nn
from transformers import Blip2PreTrainedModel, Blip2QFormerModel, Blip2VisionModel

from pipelines.encoders import weights
from pipelines.encoders.base import EncoderSpec
from pipelines.encoders.blip_pth import State, filled
from pipelines.encoders.hf_weights import checkpoint_files

# What is left out; all else must fit the model.
_LANGUAGE = ("language_model.", "language_projection.")
_WHOLE = ("model.safetensors", "pytorch_model.bin")


class Blip2Queries(Blip2PreTrainedModel):  # type: ignore[no-untyped-call]
    """The part of transformers' Blip2Model that `get_qformer_features` runs through."""

    _keep_in_fp32_modules = ["query_tokens", "qformer"]  # noqa: RUF012

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        width = config.qformer_config.hidden_size
        self.vision_model = Blip2VisionModel._from_config(config.vision_config)  # type: ignore[no-untyped-call]
        self.query_tokens = nn.Parameter(torch.zeros(1, config.num_query_tokens, width))
        self.qformer = Blip2QFormerModel._from_config(config.qformer_config)  # type: ignore[no-untyped-call]
        self.post_init()  # type: ignore[no-untyped-call]


def needed_files(folder: weights.Folder) -> list[str]:
    """The pieces of a checkpoint that hold more than its language model."""
    files = checkpoint_files(folder)
    index = next((f"{file}.index.json" for file in _WHOLE if f"{file}.index.json" in folder.names()), None)
    if index is None or files[0] in _WHOLE:
        return files
    where = json.loads((folder.fetch([index]) / index).read_text())["weight_map"]
    return sorted({file for key, file in where.items() if not key.startswith(_LANGUAGE)})


def load(spec: EncoderSpec) -> Blip2Queries:
    """Raises: EncoderError."""
    folder = weights.folder(spec.reference, spec.options)
    files, small = needed_files(folder), weights.small(folder.names())
    path = weights.fetch_verified(folder, [*files, *small], files, spec.weights)
    state = {key: value for file in files for key, value in _read(path / file).items()}
    model: Blip2Queries = filled(Blip2Queries, transformers.AutoConfig.from_pretrained(path), state, spec)
    return model


def _read(file: Path) -> State:
    """All but the language model, which is not read from the disk."""
    if file.suffix != ".safetensors":
        state = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        return {key: value for key, value in state.items() if not key.startswith(_LANGUAGE)}
    with safe_open(file, "pt") as opened:
        return {key: opened.get_tensor(key) for key in opened.keys() if not key.startswith(_LANGUAGE)}  # noqa: SIM118
