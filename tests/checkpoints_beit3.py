"""Small checkpoints of BEiT-3's retrieval models, as its training saves them, with its kind of sentencepiece model."""

from __future__ import annotations

import argparse
import io
from pathlib import Path
from typing import Any

import sentencepiece
import torch

from pipelines.encoders.multiway import Retrieval, Shape
from tests.checkpoints import CORPUS, PATCH, SIDE, redraw, some_images, some_tokens

HEADS = 4
SHAPE = Shape(dim=32, heads=HEADS, layers=2, hidden=48, vocabulary=170, positions=80, patch=PATCH, side=SIDE)


def save_beit3(folder: Path, under: str | None = "model", shape: Shape = SHAPE) -> Path:
    """`beit3.pth`, its weights under a key or bare, and `beit3.spm` beside it. The path of the checkpoint."""
    folder.mkdir(parents=True)
    save_vocabulary(folder / "beit3.spm")
    torch.manual_seed(0)
    model = Retrieval(shape).eval()
    images, tokens = some_images(side=shape.side), some_tokens(shape.vocabulary, 12)
    redraw(model, lambda: (model.images(images), model.texts(tokens, torch.ones_like(tokens))))
    save_state(folder / "beit3.pth", model.state_dict(), under)
    return folder / "beit3.pth"


def save_state(path: Path, state: dict[str, torch.Tensor], under: str | None = "model") -> None:
    """Beside the weights, what the original's training adds."""
    training = {"optimizer": {"state": {}}, "epoch": 3, "scaler": {}, "args": argparse.Namespace(lr=1e-4, task="coco")}
    saved: Any = {under: state, **training} if under else state
    torch.save(saved, path)


def save_vocabulary(path: Path, corpus: tuple[str, ...] = CORPUS) -> None:
    """`<unk>`, `<s>` and `</s>` first, as in the sentencepiece models of XLM-R."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(corpus * 4), model_writer=model, vocab_size=160, model_type="unigram",
        num_threads=1, unk_id=0, bos_id=1, eos_id=2, pad_id=-1, hard_vocab_limit=False, minloglevel=2,
    )  # fmt: skip
    path.write_bytes(model.getvalue())
