"""Captions are translated as the library translates them one by one, each text once, and what cannot be is a reject."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from pipelines.contracts import SAMPLE
from pipelines.encoders.marian import TranslationSpec, default_model, describe
from pipelines.errors import EncoderError
from pipelines.translate import Remembering, Translate, with_translations
from tests.checkpoints import save_hf
from tests.checkpoints_marian import save_marian
from tests.unit.encoders.marian_reference import MarianReference

TEXTS = [
    "un cane marrone corre sulla spiaggia",
    "una bambina ride",
    "Un UOMO con il cappello!",
    "犬 🐕",
    "x",
    "acqua " * 99,
    "un cane marrone corre sulla spiaggia",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_marian(tmp_path_factory.mktemp("marian") / "it-en")


@pytest.fixture(scope="module")
def spec(folder: Path) -> TranslationSpec:
    return describe("it:en", str(folder), {})


@pytest.fixture(scope="module")
def translate(spec: TranslationSpec) -> Translate:
    return Translate(spec, 3, "cpu")


def row(*captions: str | None, **more: Any) -> dict[str, Any]:
    place = {"shard": "s", "row": 0, "end": False, "rejects": [], "captions": list(captions)}
    return {**dict.fromkeys(SAMPLE.names), **place, **more}


def table(*rows: dict[str, Any]) -> pa.Table:
    return pa.Table.from_pylist(list(rows), SAMPLE)


def test_translations_are_the_librarys_one_by_one(folder: Path, translate: Translate) -> None:
    result = translate(table(row(*TEXTS[:3]), row(*TEXTS[3:]), row(end=True)))
    assert result.schema == SAMPLE
    found = [text for texts in result["translations"].to_pylist() for text in texts]
    naive = MarianReference(folder)
    expected = [naive(text) for text in TEXTS]
    assert found == expected
    assert len(set(expected)) >= len(set(TEXTS)) - 1, "a model that says the same of everything"
    assert result["captions"].to_pylist() == [TEXTS[:3], TEXTS[3:], []], "the original is kept"


def test_blank_and_missing_captions_stay_as_they_are(translate: Translate) -> None:
    result = translate(table(row("", "  \n", None, "una bambina ride"), row()))
    first, second = result["translations"].to_pylist()
    assert first[:3] == [None, None, None] and first[3] and second == []


def test_equal_captions_are_translated_once_and_remembered() -> None:
    asked: list[list[str]] = []

    def upper(texts: list[str]) -> list[str]:
        asked.append(texts)
        return [text.upper() for text in texts]

    remembering = Remembering(upper, size=2)
    assert remembering(["a", "b", "a"]) == ["A", "B", "A"]
    assert remembering(["b"]) == ["B"] and asked == [["a", "b"]]
    assert remembering(["a", "c", "d"]) == ["A", "C", "D"], "more than are remembered"
    assert asked[1:] == [["c", "d"]]
    remembering(["c", "d", "c", "e"])
    assert asked[2:] == [["e"]]
    remembering(["c", "d"])
    assert asked[3:] == [["d"]], "what was wanted longest ago is forgotten"
    remembering(["x" * 2_000])
    remembering(["x" * 2_000])
    assert asked[4:] == [["x" * 2_000]] * 2, "long ones are not kept"


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("CUDA error: device-side assert")])
def test_a_device_that_fails_is_no_fault_of_a_captions(error: Exception) -> None:
    def broken(texts: list[str]) -> list[str]:
        raise error

    with pytest.raises(type(error)):
        with_translations(table(row("a", "b")), Remembering(broken))


def test_how_beams_are_searched_is_part_of_a_translation(spec: TranslationSpec, folder: Path, tmp_path: Path) -> None:
    other = shutil.copytree(folder, tmp_path / "other")
    settings = json.loads((other / "generation_config.json").read_text())
    (other / "generation_config.json").write_text(json.dumps({**settings, "num_beams": 1}))
    assert describe("it:en", str(other), {}).identity() != spec.identity()


def test_a_caption_that_cannot_be_translated_is_a_reject() -> None:
    def failing(texts: list[str]) -> list[str]:
        if "bad" in texts:
            raise ValueError("no such word")
        return [f"en {text}" for text in texts]

    result = with_translations(table(row("a", "bad", "b")), Remembering(failing))
    (told,) = result.to_pylist()
    assert told["translations"] == ["en a", None, "en b"] and told["captions"] == ["a", "bad", "b"], (
        "the original stays"
    )
    (reject,) = told["rejects"]
    assert (reject["modality"], reject["stage"], reject["reason"]) == ("text", "translate", "translation_failed")
    assert reject["caption_index"] == 1 and "no such word" in reject["detail"]


def test_the_model_of_a_pair() -> None:
    assert default_model("it:en") == "Helsinki-NLP/opus-mt-it-en"


def test_a_model_that_does_not_translate_is_refused(tmp_path: Path) -> None:
    save_hf(tmp_path / "clip", "clip-eos2")
    with pytest.raises(EncoderError, match="is no MarianMTModel"):
        describe("it:en", str(tmp_path / "clip"), {})


def test_other_weights_are_another_translation(spec: TranslationSpec, tmp_path: Path) -> None:
    other = describe("it:en", str(save_marian(tmp_path / "other", seed=1)), {})
    assert other.identity() != spec.identity()
