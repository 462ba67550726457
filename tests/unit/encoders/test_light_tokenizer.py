"""A tokenizer without its library gives the library's ids, and is taken for no other."""

from __future__ import annotations

from pathlib import Path

import pytest
import transformers

from pipelines.encoders.light_tokenizer import kept, kept_digest
from pipelines.encoders.weights import default_cache
from tests.checkpoints import clip_tokenizer, gemma_tokenizer
from tests.checkpoints_blip import bert_tokenizer
from tests.unit.encoders.inputs import CAPTIONS, ENTITIES

KINDS = {
    "clip": lambda folder: clip_tokenizer(folder),
    "bert": lambda folder: bert_tokenizer(folder),
    "gemma": lambda folder: gemma_tokenizer(transformers.GemmaTokenizer),
}


@pytest.fixture(params=KINDS)
def tokens(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> transformers.PreTrainedTokenizerBase:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "saved").mkdir()
    return KINDS[request.param](tmp_path / "saved")


def test_ids_are_the_librarys(tokens: transformers.PreTrainedTokenizerBase) -> None:
    light = kept(kept_digest(tokens))
    assert light is not None
    captions = CAPTIONS + ENTITIES
    for length in (9, 64):
        ours = light(captions, truncation=True, max_length=length)["input_ids"]
        assert ours == tokens(captions, truncation=True, max_length=length)["input_ids"]
    assert (light.pad_token_id, light.unk_token_id) == (tokens.pad_token_id, tokens.unk_token_id)


def test_padding_that_was_saved_with_it_is_taken_off(tokens: transformers.PreTrainedTokenizerBase) -> None:
    tokens.backend_tokenizer.enable_padding(length=128)
    light = kept(kept_digest(tokens))
    assert light is not None
    assert len(light(["a dog"], truncation=True, max_length=64)["input_ids"][0]) < 10


def test_what_is_not_there_or_was_changed_is_not_taken(tokens: transformers.PreTrainedTokenizerBase) -> None:
    assert kept("0" * 64) is None
    digest = kept_digest(tokens)
    path = default_cache() / "tokenizers" / f"{digest}.json"
    path.write_text(path.read_text().replace("dog", "cat"))
    assert kept(digest) is None
    path.write_text("{")
    assert kept(digest) is None
