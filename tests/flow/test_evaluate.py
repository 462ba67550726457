"""The verbs that tell how good an output is, by the command line, on one output: of the demo's encoder, which knows what
it sees, and of one with random weights, which does not."""

from __future__ import annotations

import json
import tarfile
from io import BytesIO
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import s3fs

from pipelines.evaluate.kept import evaluations
from pipelines.scenes import scene
from pipelines.scenes.compose import jpeg
from pipelines.scenes.shapes import COLOURS, SHAPES
from pipelines.storage import Store
from tests.flow.command import vecmill
from tests.flow.runs import settings, write_recipe

SCENES, COPIES = 96, range(0, 96, 16)
SHARDS = {"a": range(48), "b": range(48, SCENES), "copies": COPIES}
PAIRS = {frozenset((f"a-{at}" if at < 48 else f"b-{at}", f"copies-{at}")) for at in COPIES}


def write_input(folder: Path) -> Path:
    """Scenes with their first shape as the label; in the last shard are some of them again, under other keys."""
    folder.mkdir()
    for name, indices in SHARDS.items():
        with tarfile.open(folder / f"{name}.tar", "w") as tar:
            for index in indices:
                drawn = scene(0, index)
                told = {"captions": drawn.captions, "label": drawn.objects["things"][0]["shape"]}
                for extension, data in (("jpg", jpeg(drawn.image)), ("json", json.dumps(told).encode())):
                    member = tarfile.TarInfo(f"{name}-{index}.{extension}")
                    member.size = len(data)
                    tar.addfile(member, BytesIO(data))
    return folder


@pytest.fixture(scope="module")
def output(ray_local: str, checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    root = tmp_path_factory.mktemp("evaluated")
    recipe = settings(str(write_input(root / "in")), root / "out", checkpoint)
    both = {"encoder": ["demo", recipe["encoder"]], "name": ["demo", "clip"]}
    path = write_recipe(root / "recipe.yaml", {**recipe, **both, "encode": {"batch_size": 32, "threads": 1}})
    vecmill("embed", path, "--address", ray_local)
    quick = ("--set", "recall_queries=50", "--set", "max_query_ms=1", "--floor", "0", "--address", ray_local)
    vecmill("index", str(root / "out"), "--encoder", "demo", *quick)
    return str(root / "out")


@pytest.fixture(scope="module")
def in_bucket(output: str, s3: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Store]:
    """The same in a bucket: the recipe that names it, and its store."""
    fs = s3fs.S3FileSystem(**s3["s3"])
    fs.mkdir("evaluated")
    fs.put(f"{output}/", "evaluated/out", recursive=True)
    recipe = {"input": "nowhere", "encoder": "demo", "name": "demo", "output": "s3://evaluated/out", "storage": s3}
    path = write_recipe(tmp_path_factory.mktemp("recipe") / "recipe.yaml", recipe)
    return path, Store("s3://evaluated/out", s3)


def told(*arguments: str) -> dict[str, Any]:
    """The JSON document that a command prints after what it says on the way."""
    printed = vecmill(*arguments, "--json")
    return dict(json.loads(printed[printed.index("{\n") :]))


def require_named_files(printed: str, folder: str) -> None:
    """Every path under `folder` that was printed is there."""
    named = [word.rstrip(",") for word in printed.split() if word.startswith(folder)]
    assert named and [path for path in named if not Path(path).exists()] == [], printed


def of(document: dict[str, Any], protocol: str, asks: str) -> dict[str, Any]:
    return next(each for each in document["results"] if (each["protocol"], each["asks"]) == (protocol, asks))


def test_evaluate_tells_an_encoder_that_sees_from_one_that_does_not(output: str) -> None:
    printed = vecmill("evaluate", output, "--encoder", "demo")
    assert "captions: text → image" in printed and "loss" in printed
    require_named_files(printed, output)
    seen = {"results": kept_results(Store(output))}
    blind = told("evaluate", output, "--encoder", "clip")
    items = SCENES + len(COPIES)
    for asks in ("image", "text"):
        found = of(seen, "captions", asks)
        assert found["figures"]["recall@10"] > 5 * of(blind, "captions", asks)["figures"]["recall@10"] / 2
    by_words = of(seen, "captions", "text")
    assert (by_words["gallery"], by_words["queries"]) == (items, by_words["of"])
    assert by_words["figures"]["recall@10"] > 0.5 > 5 * 10 / items
    through = by_words["through"]
    assert through["gallery"] == items and through["exact"] == pytest.approx(
        {name: by_words["figures"][name] for name in through["exact"]}, abs=0.01
    )
    assert through["loss"] == {name: through["exact"][name] - through["found"][name] for name in through["exact"]}
    assert of(seen, "label", "image")["figures"]["map"] > of(blind, "label", "image")["figures"]["map"]
    assert of(blind, "captions", "text")["through"] is None


def test_duplicates_finds_the_copies_and_remove_takes_its_list(output: str) -> None:
    printed = vecmill("duplicates", output, "--encoder", "demo", "--threshold", "0.999")
    assert f"{2 * len(PAIRS)} of {SCENES + len(COPIES)} image items are in {len(PAIRS)} groups" in printed
    folder = Path(output, "duplicates", "demo", "image")
    assert groups_in(Store(output)) == PAIRS
    assert set((folder / "remove.txt").read_text().split()) == {f"copies-{at}" for at in COPIES}
    command = next(line.split() for line in printed.splitlines() if line.startswith("  vecmill remove"))
    would = told(*command[1:], "--dry-run")
    assert {row["key"] for row in would["removed"]} == {f"copies-{at}" for at in COPIES} and would["missing"] == []
    exact = told("duplicates", output, "--encoder", "demo", "--threshold", "0.999", "--exact", "--keep", "largest")
    assert groups_in(Store(output)) == PAIRS and exact["release"] is None


def kept_results(store: Store) -> list[dict[str, Any]]:
    return [result for document in evaluations(store, "demo") for result in document["results"]]


def groups_in(store: Store) -> set[frozenset[str]]:
    with store.open("duplicates/demo/image/groups.parquet") as file:
        rows = pq.read_table(file).to_pylist()
    numbers = {row["group"] for row in rows}
    return {frozenset(row["key"] for row in rows if row["group"] == number) for number in numbers}


def test_in_a_bucket_the_same_lands_there(output: str, in_bucket: tuple[str, Store], tmp_path: Path) -> None:
    recipe, store = in_bucket
    store.delete_folder("evaluations")
    cache = ("--cache", str(tmp_path / "cache"))
    found = told("evaluate", recipe, *cache)
    assert kept_results(store) == found["results"]
    here = told("evaluate", output, "--encoder", "demo")
    assert found["results"] == here["results"]
    assert "s3://evaluated/out/report/report.html" in vecmill("report", recipe, *cache)
    assert b"</html>" in store.read("report/report.html") and json.loads(store.read("report/report.json"))["samples"]

    printed = vecmill("duplicates", recipe, "--threshold", "0.999", *cache)
    assert any((tmp_path / "cache").iterdir()), "index files are read once"
    assert groups_in(store) == PAIRS
    command = next(line.split() for line in printed.splitlines() if line.startswith("  vecmill remove"))
    assert command[-1] == "s3://evaluated/out/duplicates/demo/image/remove.txt"
    taken = told(*command[1:])
    assert {row["key"] for row in taken["removed"]} == {f"copies-{at}" for at in COPIES}
    assert told("duplicates", recipe, "--threshold", "0.999", *cache)["items"] == SCENES and groups_in(store) == set()


def test_similarity_separates_what_belongs_together(output: str) -> None:
    require_named_files(vecmill("similarity", output, "--encoder", "demo"), output)
    seen = told("similarity", output, "--encoder", "demo")
    assert json.loads(Path(seen["folder"], "similarity.json").read_text())["auc"] == seen["auc"]
    assert seen["auc"] > 0.9 > 0.65 > told("similarity", output, "--encoder", "clip")["auc"]
    assert seen["matched"]["mean"] > seen["unmatched"]["mean"]


def test_compare_puts_both_side_by_side(output: str) -> None:
    printed = vecmill("compare", output, "--key", "a-5", "--agreed", "30")
    assert "demo" in printed and "clip" in printed and "nearest in common" in printed
    require_named_files(printed, output)
    document = json.loads(Path(output, "compare", "compare.json").read_text())
    assert document["k"] == 8 and all(0 <= share <= 1 for share in document["overlap"].values())


def test_a_map_shows_every_item_drawn(output: str) -> None:
    printed = vecmill("map", output, "--encoder", "demo", "--sample", "60")
    assert f"60 of {SCENES + len(COPIES)} items by label" in printed
    require_named_files(printed, output)


def test_classify_knows_shapes(output: str, ray_local: str, tmp_path: Path) -> None:
    (tmp_path / "labels.txt").write_text("\n".join(SHAPES))
    # In words that the encoder knows: it has never read of a shape without a colour.
    (tmp_path / "templates.txt").write_text("".join(f"a {colour} {{}}\n" for colour in COLOURS))
    how = ("--template", "there is a red {}", "--template", str(tmp_path / "templates.txt"))
    asked = ("classify", output, "--encoder", "demo", "--labels", str(tmp_path / "labels.txt"), *how)
    printed = vecmill(*asked, "--dry-run")
    assert f"{len(SHARDS)} of {len(SHARDS)} parts to do" in printed and "12 labels by 156 prompts" in printed
    assert not Path(output, "classifications").exists()
    first = told(*asked, "--address", ray_local)
    assert first["images"] == first["known"] == SCENES + len(COPIES)
    # By chance one in twelve; most scenes have other shapes beside that of their label.
    assert first["accuracy"] > 2 / len(SHAPES)
    parts = sorted(Path(first["folder"]).glob("*.parquet"))
    assert [part.name for part in parts] == sorted(path.name for path in Path(output, "samples").glob("*.parquet"))
    rows = [row for part in parts for row in pq.read_table(part).to_pylist()]
    assert all(row["top"][0]["label"] == row["label"] for row in rows)
    lost, kept = parts[0], parts[1].stat().st_mtime_ns
    lost.unlink()
    assert f"1 of {len(SHARDS)} parts to do" in vecmill(*asked, "--address", ray_local)
    assert lost.exists() and parts[1].stat().st_mtime_ns == kept
    # Nothing is left to do, and no Ray is asked for it.
    assert told(*asked, "--address", "127.0.0.1:1") == first


def test_the_report_names_what_there_is(output: str) -> None:
    printed = vecmill("report", output)
    require_named_files(printed, output)
    page = Path(output, "report", "report.html").read_text()
    for words in ("Encoder demo", "Encoder clip", "Index of image", "Sample searches", "bottleneck"):
        assert words in page, words
    (run,) = json.loads(Path(output, "report", "report.json").read_text())["runs"]
    assert run["pace"][-1]["rows"]["read"] == run["stages"]["read"]["rows"] >= SCENES + len(COPIES)
    assert run["pace"][-1]["seconds"] == pytest.approx(run["seconds"], rel=0.5)


def test_a_mistake_is_one_message(output: str, tmp_path: Path) -> None:
    (tmp_path / "one.txt").write_text("circle\n")
    mistakes = {
        "has 2 encoders: name one with --encoder": ["evaluate", output],
        "is not the output of an embed run": ["report", str(tmp_path)],
        "--protocol nope is not known": ["evaluate", output, "--encoder", "demo", "--protocol", "nope"],
        "needs to know who is who": ["evaluate", output, "--encoder", "demo", "--protocol", "identity"],
        "--keep best is not known": ["duplicates", output, "--encoder", "demo", "--keep", "best"],
        "no multimodal vectors": ["similarity", output, "--encoder", "demo", "--a", "multimodal"],
        "1 labels to choose from": ["classify", output, "--encoder", "demo", "--labels", str(tmp_path / "one.txt")],
        "none.txt cannot be read": ["classify", output, "--encoder", "demo", "--labels", str(tmp_path / "none.txt")],
        "nothing to compare it with": ["compare", output, "--encoder", "demo"],
    }
    for words, arguments in mistakes.items():
        printed = vecmill(*arguments, status=2)
        assert words in printed and "Traceback" not in printed and printed.count("vecmill: ") == 1, printed
    printed = vecmill("duplicates", output, "--encoder", "clip", status=1)
    assert "Run `vecmill index` first" in printed and "Traceback" not in printed
