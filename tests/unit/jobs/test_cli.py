"""The command line without a cluster: help, and one clear message for every mistake."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import typer
import yaml

from jobs.cli import app, main
from pipelines.encoders import registry
from pipelines.record import RunRecord, encoder_record, write_record
from pipelines.storage import Store
from tests.checkpoints import save_open_clip

VERBS = sorted(typer.main.get_command(app).commands)  # type: ignore[attr-defined]
LEAST = {"input": "shards", "output": "out", "encoder": "open_clip:ViT-B-32"}


class Said(NamedTuple):
    code: int
    out: str
    err: str


Vecmill = Callable[..., Said]


@pytest.fixture
def vecmill(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Vecmill:
    """The console command in an empty folder, where `recipe.yaml` is a good one. Anything else that it
    raises would be a traceback."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    Path("recipe.yaml").write_text(yaml.safe_dump(LEAST))

    def run(*words: str) -> Said:
        monkeypatch.setattr(sys, "argv", ["vecmill", *words])
        with pytest.raises(SystemExit) as exited:
            main()
        code = exited.value.code
        assert code is None or isinstance(code, int)
        return Said(code or 0, *capsys.readouterr())

    return run


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An output of which only the record is there."""
    folder = tmp_path_factory.mktemp("output")
    name = f"open_clip:local-dir:{save_open_clip(folder / 'model')}"
    spec = registry.describe(name)
    settings = {**LEAST, "encoder": name, "input": [str(folder / "gone")]}
    record = RunRecord(encoders={"clip": encoder_record(spec, ("image", "text"), 64)}, settings=settings)
    write_record(Store(str(folder / "out")), record)
    return folder / "out"


def assert_refused(said: Said, *told: str) -> None:
    """One message in plain words, and the exit code of a usage mistake."""
    message = " ".join(said.err.split())
    assert said.code == 2, said
    assert said.out == "" and "Traceback" not in said.err
    assert [words for words in told if words not in message] == [], message
    assert message.count("vecmill: ") <= 1 and len(said.err.splitlines()) < 15


# -- help ----------------------------------------------------------------------------------------


def test_help_lists_every_verb(vecmill: Vecmill) -> None:
    assert VERBS == ["demo", "embed", "index", "plan", "search", "status"]
    said = vecmill("--help")
    assert said.code == 0 and all(re.search(rf"\b{verb}\b", said.out) for verb in VERBS)
    assert vecmill().out.split() == said.out.split()


@pytest.mark.parametrize("verb", VERBS)
def test_help_of_a_verb_has_an_example_of_it(vecmill: Vecmill, verb: str) -> None:
    for flag in ("--help", "-h"):
        said = vecmill(verb, flag)
        assert said.code == 0 and re.search(rf"Example: vecmill {verb} \S+", said.out), said.out


# -- mistakes of recipes and flags ---------------------------------------------------------------


@pytest.mark.parametrize("verb", ["embed", "plan"])
@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["none.yaml"], ["There is no recipe none.yaml"]),
        (["recipe.yaml", "--set", "encode.precison=fp16"], ["encode.precison: unknown key", "precision, batch_size"]),
        (["recipe.yaml", "--set", "encode.threads=0"], ["encode.threads: 0 is not allowed", "greater than 0"]),
        (["recipe.yaml", "--set", "encode.threads"], ["--set encode.threads: KEY=VALUE is expected"]),
        (["recipe.yaml", "--set", "encode.threads=[1"], ["--set encode.threads=[1: the value is not YAML"]),
        (["recipe.yaml", "--set", "output.a=1"], ["output: 'out' is not allowed"]),
        (["recipe.yaml", "--precision", "int8"], ["encode.precision: 'int8' is not allowed", "'bf16'"]),
        (["recipe.yaml", "--modalities", "video"], ["modalities", "'video'", "'image' or 'text'"]),
        (["recipe.yaml", "--name", "a/b"], ["name: 'a/b'"]),
        (["recipe.yaml", "--output", "nope://x"], ["nope://x cannot be an output", "nope"]),
        (["recipe.yaml", "other.yml"], ["2 recipes were given: recipe.yaml, other.yml"]),
        (["shards", "--encoder", "open_clip:x"], ["output: missing; give it in the recipe or as a flag"]),
        (["shards", "--output", "out"], ["encoder: missing"]),
        ([], ["Missing argument"]),
        (["recipe.yaml", "--nope"], ["No such option: --nope"]),
    ],
)
def test_a_mistaken_setting_is_told_before_anything_starts(
    vecmill: Vecmill, verb: str, words: list[str], told: list[str]
) -> None:
    assert_refused(vecmill(verb, *words), *told)
    assert [path.name for path in Path().iterdir()] == ["recipe.yaml"]


def test_flags_of_embed_alone_are_checked_too(vecmill: Vecmill) -> None:
    assert_refused(vecmill("embed", "recipe.yaml", "--batch-size", "0"), "encode.batch_size: 0 is not allowed")
    assert_refused(vecmill("embed", "recipe.yaml", "--batch-size", "many"), "'--batch-size'")
    assert_refused(vecmill("embed", "recipe.yaml", "--dtype", "float64"), "write.dtype: 'float64'", "'float32'")
    assert_refused(vecmill("embed", "recipe.yaml", "--reject-ceiling", "7"), "write.reject_ceiling: 7.0")


def test_an_unknown_verb_is_told(vecmill: Vecmill) -> None:
    assert_refused(vecmill("embedd"), "No such command 'embedd'")


# -- mistakes of outputs -------------------------------------------------------------------------


@pytest.mark.parametrize(
    "words", [["status"], ["search", "--text", "a"], ["search", "--text", "a", "--exact"], ["index"]]
)
@pytest.mark.parametrize("where", ["none", "folder", "file", "memory://none"])
def test_an_output_that_is_not_ours_is_told(vecmill: Vecmill, words: list[str], where: str) -> None:
    Path("folder").mkdir()
    Path("folder", "a.txt").write_text("b")
    Path("file").write_text("c")
    assert_refused(vecmill(words[0], where, *words[1:]), f"{where} is not the output of an embed run")


@pytest.mark.parametrize("words", [["status"], ["search", "--text", "a"], ["index"]])
def test_an_output_of_no_known_protocol_is_told(vecmill: Vecmill, words: list[str]) -> None:
    assert_refused(vecmill(words[0], "nope://out", *words[1:]), "nope://out")


@pytest.mark.parametrize("words", [["status"], ["search", "--text", "a"], ["index"]])
def test_a_recipe_stands_for_its_output(vecmill: Vecmill, words: list[str]) -> None:
    assert_refused(vecmill(words[0], "recipe.yaml", *words[1:]), "/out is not the output of an embed run")
    assert_refused(vecmill(words[0], "none.yaml", *words[1:]), "There is no recipe none.yaml")


def test_another_run_json_is_told(vecmill: Vecmill) -> None:
    Path("run.json").write_text("{")
    said = vecmill("status", ".")
    assert said.code == 1 and "run.json is not a run record" in said.err and "Traceback" not in said.err


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ([], "There is nothing to search for"),
        (["--text", "a", "--encoder", "other"], "has no encoder 'other' It has: clip."),
        (["--text", "a", "--modality", "video"], "--modality video: image or text is expected"),
        (["--text", "a", "-k", "0"], "'-k'"),
        (["--queries", "none.jsonl"], "none.jsonl cannot be read"),
        (["--queries", "bad.jsonl"], "bad.jsonl, line 2:"),
    ],
)
def test_a_mistaken_search_is_told(vecmill: Vecmill, output: Path, words: list[str], told: str) -> None:
    Path("bad.jsonl").write_text('{"text": "a"}\n{"txt": "a"}\n')
    assert_refused(vecmill("search", str(output), *words), told)


def test_a_search_without_an_index_says_what_to_do(vecmill: Vecmill, output: Path) -> None:
    said = vecmill("search", str(output), "--text", "a")
    assert said.code in (1, 2) and "vecmill index" in said.err and "Traceback" not in said.err


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--encoder", "other"], "has no encoder 'other' It has: clip."),
        (["--modality", "video"], "--modality video: image or text is expected"),
        (["--metric", "cosine"], "metric: 'cosine' is not allowed: Input should be 'ip' or 'l2'"),
        (["--shards", "0"], "shards: 0 is not allowed"),
        (["--set", "index.sedd=1"], "sedd: unknown key"),
    ],
)
def test_a_mistaken_index_is_told(vecmill: Vecmill, output: Path, words: list[str], told: str) -> None:
    assert_refused(vecmill("index", str(output), *words), told)


def test_the_recipes_that_ship_are_good() -> None:
    from pipelines.config import load_config

    recipes = sorted((Path(__file__).parents[3] / "jobs" / "recipes").glob("*.yaml"))
    assert recipes
    for recipe in recipes:
        assert json.loads(load_config(recipe).model_dump_json())
