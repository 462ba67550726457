"""A small Marian model with random weights, as Helsinki-NLP's are laid out."""

from __future__ import annotations

import io
import json
from pathlib import Path

import sentencepiece
import torch
import transformers

from tests.checkpoints import CORPUS

SPECIAL = ("</s>", "<unk>", "<pad>")
LONGEST = 12


def save_marian(folder: Path, seed: int = 0) -> Path:
    """A folder for `translate.model`, whose translations are short, differ, and mean nothing."""
    folder.mkdir(parents=True)
    pieces = [_vocabulary(folder / name) for name in ("source.spm", "target.spm")]
    words = list(dict.fromkeys([*SPECIAL[:2], *pieces[0], *pieces[1], SPECIAL[2]]))
    (folder / "vocab.json").write_text(json.dumps({word: at for at, word in enumerate(words)}))
    tokens = transformers.MarianTokenizer(
        vocab=str(folder / "vocab.json"),
        source_spm=str(folder / "source.spm"),
        target_spm=str(folder / "target.spm"),
        source_lang="it",
        target_lang="en",
    )
    tokens.save_pretrained(folder)
    model = transformers.MarianMTModel(_config(len(words)))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                # What is translated must tell more than what was said last.
                scale = 1.0 if "encoder_attn" in name else 0.2
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)
    model.generation_config.bad_words_ids = [[len(words) - 1]]
    model.generation_config.num_beams = 3
    model.generation_config.max_length = LONGEST
    model.save_pretrained(folder)
    return folder


def _vocabulary(path: Path) -> list[str]:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS * 4), model_writer=model, vocab_size=120, model_type="unigram", num_threads=1,
        pad_id=-1, bos_id=-1, eos_id=0, unk_id=1, hard_vocab_limit=False, minloglevel=2,
    )  # fmt: skip
    path.write_bytes(model.getvalue())
    spm = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    return [spm.id_to_piece(at) for at in range(spm.vocab_size())]


def _config(words: int) -> transformers.MarianConfig:
    return transformers.MarianConfig(
        vocab_size=words,
        decoder_vocab_size=words,
        d_model=32,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=64,
        decoder_ffn_dim=64,
        max_position_embeddings=128,
        pad_token_id=words - 1,
        eos_token_id=0,
        forced_eos_token_id=0,
        decoder_start_token_id=words - 1,
    )
