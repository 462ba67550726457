"""The command line without a cluster: help, and one clear message for every mistake."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import sys
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import fields
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import typer
import yaml

from jobs.cli import app, main
from jobs.search import place_of
from pipelines.config import IndexConfig
from pipelines.encoders import registry
from pipelines.index.manifest import Recall
from pipelines.index.publish import NotPublishedError, Obstacle
from pipelines.index.release import finish, read_release
from pipelines.record import RunRecord, encoder_record, read_record, write_record
from pipelines.search import Hit
from pipelines.storage import Store
from tests.checkpoints import save_open_clip
from tests.indexed import part_name
from tests.unit.test_search import Opened, write_release

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


@pytest.fixture(scope="module")
def embedded(output: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An output of that encoder and its index, with vectors drawn at random."""
    folder = tmp_path_factory.mktemp("embedded")
    record = read_record(Store(str(output)))
    write_release(
        folder, parts=2, shards=2, dim=record.encoders["clip"].spec["vectors"]["image"]["dim"], encoder="clip"
    )
    (folder / "run.json").unlink()
    write_record(Store(str(folder)), record)
    return folder


def assert_refused(said: Said, *told: str) -> None:
    """One message in plain words, and the exit code of a usage mistake."""
    message = " ".join(said.err.split())
    assert said.code == 2, said
    assert said.out == "" and "Traceback" not in said.err
    assert [words for words in told if words not in message] == [], message
    assert message.count("vecmill: ") <= 1 and len(said.err.splitlines()) < 15


# -- help ----------------------------------------------------------------------------------------


def test_help_lists_every_verb(vecmill: Vecmill) -> None:
    assert VERBS == [
        "classify",
        "collect",
        "compare",
        "demo",
        "duplicates",
        "embed",
        "encoders",
        "evaluate",
        "fit",
        "index",
        "map",
        "plan",
        "publish",
        "releases",
        "remove",
        "report",
        "rollback",
        "search",
        "similarity",
        "split",
        "stats",
        "status",
        "train",
        "verify",
    ]
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
        (["recipe.yaml", "--set", "encode.threads=[1"], ["--set encode.threads: the value is not YAML"]),
        (["recipe.yaml", "--set", "output.a=1"], ["output: 'out' is not allowed"]),
        (["recipe.yaml", "--precision", "int8"], ["encode.precision: 'int8' is not allowed", "'bf16'"]),
        (["recipe.yaml", "--modalities", "video"], ["modalities", "'video'", "'image', 'text' or 'multimodal'"]),
        (["recipe.yaml", "--name", "a/b"], ["name.0: 'a/b'"]),
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
        (["--text", "a", "--modality", "video"], "'video' is not one of"),
        (["--text", "a", "-k", "0"], "'-k'"),
        (["--queries", "none.jsonl"], "none.jsonl cannot be read"),
        (["--text", "a", "--metric", "l1"], "--metric goes with --exact"),
        (["--text", "a", "--exact", "--metric", "hamming"], "Known: ip, l2, cosine, l1"),
        (["--text", "a", "--exact", "--rerank", "4"], "--rerank goes without --exact"),
        (["--text", "a", "--rerank", "-1"], "'--rerank'"),
        (["--text", "a", "--where", "hight > 3"], "hight is not a column"),
        (["--text", "a", "--page", "2", "--offset", "10"], "--page and --offset say the same"),
        (["--text", "a", "--fold", "1.5"], "'--fold'"),
    ],
)
def test_a_mistaken_search_is_told(vecmill: Vecmill, output: Path, words: list[str], told: str) -> None:
    assert_refused(vecmill("search", str(output), *words), told)


@pytest.mark.parametrize("words", [["search", "--text", "a"], ["duplicates"], ["evaluate"], ["report"]])
def test_a_mistaken_size_of_the_cache_is_told(vecmill: Vecmill, output: Path, words: list[str]) -> None:
    said = vecmill(words[0], str(output), *words[1:], "--cache-size", "much")
    assert_refused(said, "--cache-size: 'much' is not a size")


@pytest.mark.parametrize("line", ['{"txt": "a"}', '{"text": 5}', '{"text": "\\ud800"}', '["a"]', "null", "a", "{"])
def test_a_mistaken_line_of_queries_is_told(vecmill: Vecmill, output: Path, line: str) -> None:
    Path("bad.jsonl").write_text(f'{{"text": "a"}}\n\n{line}\n')
    assert_refused(vecmill("search", str(output), "--queries", "bad.jsonl"), "bad.jsonl, line 3:", line)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--image", "foo://x"], "The query image foo://x cannot be read: Protocol not known: foo"),
        (["--image", "none.jpg"], "The query image none.jpg cannot be read"),
        (["--image", "."], "The query image . cannot be read"),
        (["--text", "caf\udce9"], "is not Unicode text"),
        (["--not-text", "a"], "neither text nor image nor what it is like"),
        (["--like", "none"], "has no vector of the key 'none'"),
        (["--like-id", "100000"], "There is no id 100000"),
        (["--like", "00000/000003", "--like-modality", "multimodal"], "clip has no multimodal vectors"),
    ],
)
def test_a_query_that_cannot_be_read_is_told(vecmill: Vecmill, embedded: Path, words: list[str], told: str) -> None:
    assert_refused(vecmill("search", str(embedded), "--exact", *words), told)


def test_a_search_by_example_filtered_paged_and_folded(vecmill: Vecmill, embedded: Path) -> None:
    words = ["search", str(embedded), "--like", "00001/000003", "-k", "4", "--json"]
    everything = json.loads(vecmill(*words).out)
    assert everything["hits"][0]["key"] == "00001/000003" and everything["offset"] == 0
    by_id = json.loads(vecmill(*[*words[:2], "--like-id", str(everything["hits"][0]["id"]), *words[4:]]).out)
    assert by_id["hits"] == everything["hits"] and by_id["query"]["like_id"] == everything["hits"][0]["id"]
    second = json.loads(vecmill(*words, "--page", "2").out)
    eight = json.loads(vecmill(*words[:-2], "8", "--json", "--exact").out)
    assert second["offset"] == 4
    assert [hit["id"] for hit in everything["hits"] + second["hits"]] == [hit["id"] for hit in eight["hits"]]
    among = json.loads(vecmill(*words, "--where", "row < 40 and key starts with '00000'").out)
    assert len(among["hits"]) == 4 and all(hit["row"] < 40 and hit["key"] < "00001" for hit in among["hits"])
    folded = json.loads(vecmill(*words, "--fold", "0").out)
    assert sum(1 + len(hit["folded"]) for hit in folded["hits"]) >= 4
    assert {"id", "key", "score"} <= folded["hits"][0]["folded"][0].keys()
    said = vecmill(*words[:-1], "--where", "row < 5", "--fold", "0")
    assert "Among 10 of 376 vectors." in said.out and "like 00001/000003" in said.out and "like it: 0" in said.out


def test_words_are_looked_away_from(vecmill: Vecmill, embedded: Path) -> None:
    def first(*words: str) -> list[int]:
        return [
            hit["id"] for hit in json.loads(vecmill("search", str(embedded), *words, "--exact", "--json").out)["hits"]
        ]

    plain = first("--text", "a dog")
    assert first("--text", "a dog", "--not-text", "a cat", "--not-weight", "0") == plain
    assert first("--text", "a dog", "--not-text", "a cat", "--not-weight", "5") != plain
    assert first("--text", "a dog", "--like", "00000/000003", "--text-weight", "0")[0] == 3
    Path("several.jsonl").write_text(
        '{"text": "a dog"}\n{"like": "00000/000003", "not_text": "x", "not_weight": 0.1}\n'
    )
    said = vecmill("search", str(embedded), "--queries", "several.jsonl", "--exact", "--json").out.splitlines()
    assert [hit["id"] for hit in json.loads(said[0])["hits"]] == plain
    assert json.loads(said[1])["query"]["not_text"] == "x"


def test_a_search_without_an_index_says_what_to_do(vecmill: Vecmill, output: Path) -> None:
    said = vecmill("search", str(output), "--text", "a")
    assert said.code in (1, 2) and "vecmill index" in said.err and "Traceback" not in said.err


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--encoder", "other"], "has no encoder 'other' It has: clip."),
        (["--modality", "video"], "'video' is not one of"),
        (["--metric", "cosine"], "metric: 'cosine' is not allowed: Input should be 'ip' or 'l2'"),
        (["--shards", "0"], "shards: 0 is not allowed"),
        (["--rerank", "float64"], "rerank: 'float64' is not allowed"),
        (["--floor", "1.5"], "floor: 1.5 is not allowed"),
        (["--set", "index.keep=0"], "keep: 0 is not allowed"),
        (["--set", "index.sedd=1"], "sedd: unknown key"),
    ],
)
def test_a_mistaken_index_is_told(vecmill: Vecmill, output: Path, words: list[str], told: str) -> None:
    assert_refused(vecmill("index", str(output), *words), told)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What the last `vecmill index` would have built, and on which cluster."""
    found: dict[str, Any] = {}

    def build(store: Store, encoder: str, modality: str, settings: IndexConfig, *_: Any) -> None:
        found.update(encoder=encoder, modality=modality, **settings.model_dump())

    monkeypatch.setattr("pipelines.index.build.build_index", build)
    monkeypatch.setattr("jobs.index.connected", lambda address: nullcontext(found.update(address=address)))
    monkeypatch.setattr("jobs.index.print_release", lambda *_: None)
    return found


@pytest.fixture
def both(output: Path, tmp_path: Path) -> Path:
    """An output of the encoders `clip` and `other`, whose embed run was told of an index too."""
    record = read_record(Store(str(output)))
    encoders = {"clip": record.encoders["clip"], "other": record.encoders["clip"]}
    settings = {**record.settings, "index": {"shards": 9, "seed": 9}}
    write_record(Store(str(tmp_path / "out")), RunRecord(encoders=encoders, settings=settings))
    return tmp_path / "out"


def test_an_index_is_built_as_its_recipe_says_and_flags_win(
    vecmill: Vecmill, both: Path, asked: dict[str, Any]
) -> None:
    own = {"name": "clip", "index": {"shards": 3, "max_query_ms": 7}, "cluster": {"address": "head:1"}}
    Path("recipe.yaml").write_text(yaml.safe_dump({**LEAST, **own}))
    assert vecmill("index", "recipe.yaml").code == 0
    told = {"encoder": "clip", "address": "head:1", "shards": 3, "max_query_ms": 7, "seed": 0}
    assert told.items() <= asked.items()
    flags = ["--encoder", "other", "--address", "a:2", "--modality", "text", "--shards", "4", "--set", "index.seed=5"]
    assert vecmill("index", "recipe.yaml", *flags).code == 0
    told = {"encoder": "other", "address": "a:2", "modality": "text", "shards": 4, "max_query_ms": 7, "seed": 5}
    assert told.items() <= asked.items()


def test_an_index_without_a_recipe_is_built_as_its_embed_run_was_told(
    vecmill: Vecmill, both: Path, asked: dict[str, Any]
) -> None:
    assert vecmill("index", "out", "--encoder", "clip", "--seed", "2").code == 0
    assert {"encoder": "clip", "address": None, "shards": 9, "max_query_ms": 10, "seed": 2}.items() <= asked.items()


def test_an_output_of_an_earlier_version_is_indexed_with_what_its_settings_are_now(
    vecmill: Vecmill, both: Path, asked: dict[str, Any]
) -> None:
    store = Store(str(both))
    old = {"index": {"max_index_memory": "3G", "seed": 9, "beam": 4}}
    write_record(store, read_record(store).model_copy(update={"settings": old}))
    said = vecmill("index", "out", "--encoder", "clip")
    assert said.code == 0 and {"shard_memory": "3G", "seed": 9}.items() <= asked.items()
    assert "has index.beam, which this version has no more: left out" in said.err and "max_index_memory" not in said.err


@pytest.mark.parametrize("words", [["index"], ["search", "--text", "a"]])
def test_the_encoder_of_a_recipe_is_the_one_that_is_meant(vecmill: Vecmill, both: Path, words: list[str]) -> None:
    Path("recipe.yaml").write_text(yaml.safe_dump({**LEAST, "name": "third"}))
    assert_refused(vecmill(words[0], "recipe.yaml", *words[1:]), "has no encoder 'third' It has: clip, other.")
    Path("recipe.yaml").write_text(yaml.safe_dump(LEAST))
    assert_refused(vecmill(words[0], "recipe.yaml", *words[1:]), "has 2 encoders: name one with --encoder")


# -- answers -------------------------------------------------------------------------------------


@pytest.fixture
def released(embedded: Path, tmp_path: Path) -> Path:
    """A copy of that output with a second release, which finds too little."""
    shutil.copytree(embedded, tmp_path / "released")
    store = Store(str(tmp_path / "released"))
    first = read_release(store, "clip", "image")
    for shard in first.shards:
        store.copy(f"{first.folder}/{shard.file}", f"index/clip/image/v0002/{shard.file}")
    recall = Recall(queries={"image": 5}, figures={"image": {"recall@1": 0.5, "recall@10": 0.55, "recall@100": 0.6}})
    finish(store, first.model_copy(update={"version": "v0002", "recall": recall}), publish=False)
    return tmp_path / "released"


def test_releases_are_published_and_rolled_back(vecmill: Vecmill, released: Path) -> None:
    def states() -> list[str]:
        return [fact["state"] for fact in json.loads(vecmill("releases", "released", "--json").out)]

    assert states() == ["current", "built"]
    said = vecmill("publish", "released", "--release", "v0002")
    assert said.code == 5 and "recall@10 of image queries is 0.550, below the floor of 0.9" in said.err
    assert "--release v0002 --floor 0.55" in said.err and states() == ["current", "built"]
    said = vecmill("publish", "released", "--floor", "0.5")
    assert said.code == 0 and "v0002 is the current release" in said.err and states() == ["previous", "current"]
    said = vecmill("rollback", "released")
    assert said.code == 0 and "v0001 is the current release" in said.err and states() == ["current", "withdrawn"]
    said = vecmill("rollback", "released")
    assert said.code == 1 and "no release before v0001" in said.err and "Traceback" not in said.err
    said = vecmill("releases", "released")
    assert re.search(r"v0002 +withdrawn .*recall@10 0.550", said.out)


def test_an_index_that_is_not_published_prints_its_figures_and_says_why(
    vecmill: Vecmill, released: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    barred = read_release(Store(str(released)), "clip", "image", "v0002")

    def build(*_: Any) -> None:
        raise NotPublishedError(barred, [Obstacle("recall is low", "Accept it.")])

    monkeypatch.setattr("pipelines.index.build.build_index", build)
    monkeypatch.setattr("jobs.index.connected", lambda address: nullcontext())
    said = vecmill("index", "released")
    assert said.code == 5 and "recall@10 0.550" in said.out
    assert "v0002 is built but not published: recall is low" in said.err and "Accept it." in said.err


@pytest.mark.parametrize("verb", ["releases", "publish", "rollback"])
def test_releases_of_an_output_that_is_not_ours_or_has_none_are_told(vecmill: Vecmill, output: Path, verb: str) -> None:
    assert_refused(vecmill(verb, "none"), "none is not the output of an embed run")
    said = vecmill(verb, str(output))
    assert "Traceback" not in said.err and said.code == (0 if verb == "releases" else 1)
    assert "vecmill index" in said.out + said.err or "vecmill releases" in said.err


@pytest.mark.parametrize("how", [["--exact"], []])
def test_hits_are_told_with_their_place(vecmill: Vecmill, embedded: Path, how: list[str]) -> None:
    said = vecmill("search", str(embedded), "--text", "a", "-k", "3", *how)
    assert said.code == 0 and len(re.findall(r"photos-0000\d.tar bytes \d+-\d+", said.out)) == 3
    hits = json.loads(vecmill("search", str(embedded), "--text", "a", "-k", "3", "--json", *how).out)["hits"]
    told = {"id", "score", "key", "shard", "row", "caption_index", "caption", "captions", "uri", "offset", "length"}
    assert len(hits) == 3 and all(told <= hit.keys() and "vector" not in hit for hit in hits)


def test_a_search_holds_one_index_shard_at_a_time(
    vecmill: Vecmill, embedded: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = Opened(monkeypatch)
    assert vecmill("search", str(embedded), "--text", "a").code == 0
    assert (len(opened.alive), opened.most) == (2, 1)


def test_what_is_left_out_is_one_line_beside_the_hits(vecmill: Vecmill, embedded: Path) -> None:
    shutil.copytree(embedded, "less")
    Path("less", "embeddings", "clip", "image", part_name(1)).unlink()
    said = vecmill("search", "less", "--text", "a", "-k", "1000", "--json")
    assert said.code == 0 and len(json.loads(said.out)["hits"]) == 188
    assert len(said.err.splitlines()) == 1 and said.err.startswith("188 hits were left out")


@pytest.mark.parametrize(
    ("uri", "place"),
    [("a.tar", "bytes 512-521"), ("s3://b/a.tar.gz", "unpacked bytes 512-521"), ("a.TGZ", "unpacked bytes 512-521")],
)
def test_bytes_of_a_gzipped_tar_are_those_unpacked(uri: str, place: str) -> None:
    assert place_of(hit_in(uri, offset=512, length=10)) == f"{uri} {place}"


def test_the_place_of_what_is_no_member_of_a_tar() -> None:
    assert place_of(hit_in("a.parquet", row_group=2)) == "a.parquet row group 2"
    assert place_of(hit_in("photos/a.jpg")) == "photos/a.jpg"


def hit_in(uri: str, offset: int | None = None, length: int | None = None, row_group: int | None = None) -> Hit:
    place = {"uri": uri, "offset": offset, "length": length, "row_group": row_group}
    facts = {field.name: None for field in fields(Hit)} | place
    return Hit(**facts)


# -- recipes that ship ---------------------------------------------------------------------------


def test_the_recipes_that_ship_are_good() -> None:
    from pipelines.config import load_config

    recipes = sorted((Path(__file__).parents[3] / "jobs" / "recipes").glob("*.yaml"))
    assert recipes
    for recipe in recipes:
        assert json.loads(load_config(recipe).model_dump_json())


def test_the_training_recipes_that_ship_are_good() -> None:
    from pipelines.config import load_settings
    from pipelines.training.settings import TrainConfig

    recipes = sorted((Path(__file__).parents[3] / "jobs" / "recipes" / "training").glob("*.yaml"))
    assert recipes
    for recipe in recipes:
        assert json.loads(load_settings(TrainConfig, recipe).model_dump_json())


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_what_is_stopped_says_so_and_how_to_go_on(
    vecmill: Vecmill, monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    stopped = typer.Typer()
    stopped.command()(lambda: os.kill(os.getpid(), number))
    monkeypatch.setattr("jobs.cli.app", stopped)
    said = vecmill()
    assert said.code == 128 + number
    assert said.err == "vecmill: stopped. What is committed stays; run the same command to go on.\n"
