"""Small models of sentence-transformers, laid out as the library saves them."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import sentencepiece
import torch
import transformers
from safetensors.torch import save_file

from tests.checkpoints import CORPUS, redraw, some_tokens

DIM, POSITIONS = 32, 60
_WIDTH = {"hidden_size": DIM, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}
_MODULE = "sentence_transformers.models"


def save_st(
    folder: Path,
    kind: str = "bert",
    pooling: dict[str, Any] | None = None,
    dense: dict[str, Any] | None = None,
    normalize: bool = False,
    settings: dict[str, Any] | None = None,
    prompts: dict[str, Any] | None = None,
    safe: bool = True,
) -> Path:
    """A folder for `st:`. kind: bert, xlm-roberta or distilbert.

    pooling: of 1_Pooling/config.json; the mean if left out. dense: of 2_Dense/config.json, weights drawn.
    settings: of sentence_bert_config.json. prompts: of config_sentence_transformers.json.
    """
    folder.mkdir(parents=True)
    tokens = _word_pieces(folder) if kind in ("bert", "distilbert") else _sentence_pieces()
    tokens.save_pretrained(folder)
    save_transformer(folder, kind, len(tokens), safe)
    modules = ["Transformer", "Pooling", *(["Dense"] if dense else []), *(["Normalize"] if normalize else [])]
    listed = [
        {"idx": at, "name": str(at), "path": f"{at}_{module}" if at else "", "type": f"{_MODULE}.{module}"}
        for at, module in enumerate(modules)
    ]
    _write(folder / "modules.json", listed)
    _write(folder / "sentence_bert_config.json", settings or {"max_seq_length": 40, "do_lower_case": False})
    _write(
        folder / "config_sentence_transformers.json", {"prompts": {}, "default_prompt_name": None, **(prompts or {})}
    )
    _write(folder / "1_Pooling" / "config.json", pooling or old_pooling("mean_tokens"))
    if dense:
        save_dense(folder / "2_Dense", dense, safe)
    return folder


def old_pooling(*modes: str) -> dict[str, Any]:
    """As before version 6: a truth value for each of the modes."""
    known = ("cls_token", "mean_tokens", "max_tokens", "mean_sqrt_len_tokens", "weightedmean_tokens", "lasttoken")
    return {"word_embedding_dimension": DIM, **{f"pooling_mode_{mode}": mode in modes for mode in known}}


def save_transformer(folder: Path, kind: str, vocabulary: int, safe: bool) -> None:
    model = _transformer(kind, vocabulary)
    ids = some_tokens(vocabulary, 12)
    ids[:, 0] = 2  # all texts begin alike, and what is pooled there must yet spread
    redraw(model, lambda: (hidden := model(ids).last_hidden_state, hidden[:, 0], hidden.mean(1))[1:])
    model.save_pretrained(folder)
    if not safe:  # as older checkpoints are
        (folder / "model.safetensors").unlink()
        torch.save(model.state_dict(), folder / "pytorch_model.bin")


def _transformer(kind: str, vocabulary: int) -> Any:
    torch.manual_seed(0)
    if kind == "distilbert":
        config = transformers.DistilBertConfig(
            vocab_size=vocabulary, dim=DIM, hidden_dim=48, n_layers=3, n_heads=4, max_position_embeddings=POSITIONS
        )
        return transformers.DistilBertModel(config).eval()
    if kind == "bert":
        config = transformers.BertConfig(vocab_size=vocabulary, max_position_embeddings=POSITIONS, **_WIDTH)
        return transformers.BertModel(config).eval()
    config = transformers.XLMRobertaConfig(
        vocab_size=vocabulary,
        max_position_embeddings=POSITIONS,
        pad_token_id=1,
        bos_token_id=0,
        eos_token_id=2,
        **_WIDTH,
    )
    return transformers.XLMRobertaModel(config).eval()


def save_dense(folder: Path, config: dict[str, Any], safe: bool = True) -> None:
    generator = torch.Generator().manual_seed(5)
    inputs, outputs = config["in_features"], config["out_features"]
    state = {"linear.weight": torch.randn(outputs, inputs, generator=generator) / inputs**0.5}
    if config.get("bias", True):
        state["linear.bias"] = torch.randn(outputs, generator=generator) * 0.1
    _write(folder / "config.json", config)
    if safe:
        save_file(state, folder / "model.safetensors")
    else:
        torch.save(state, folder / "pytorch_model.bin")


def _word_pieces(folder: Path) -> Any:
    """BERT's, cased: whole words of the corpus, and all its letters as pieces."""
    words = sorted({word for line in CORPUS for word in line.split()} | {"Dog", "water", "Runs"})
    letters = sorted({letter for line in CORPUS for letter in line if letter != " "} | set("ABCDéüß犬"))
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    pieces = [*special, *letters, *(f"##{letter}" for letter in letters), *words]
    (folder / "vocab.txt").write_text("\n".join(dict.fromkeys(pieces)))
    return transformers.BertTokenizer(vocab=str(folder / "vocab.txt"), do_lower_case=False)


def _sentence_pieces() -> Any:
    """XLM-R's: a unigram model, its first ids those of fairseq."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS * 4), model_writer=model, vocab_size=160, model_type="unigram",
        num_threads=1, unk_id=0, bos_id=1, eos_id=2, pad_id=-1, hard_vocab_limit=False, minloglevel=2,
    )  # fmt: skip
    trained = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    pieces = [(trained.id_to_piece(at), trained.get_score(at)) for at in range(3, len(trained))]
    special: Sequence[tuple[str, float]] = [("<s>", 0.0), ("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    return transformers.XLMRobertaTokenizer(vocab=[*special, *pieces, ("<mask>", 0.0)])


def _write(path: Path, value: Any) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(value))
