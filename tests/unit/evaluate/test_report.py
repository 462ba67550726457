"""Pages of an output with pictures, some of which are gone, looked at in a real browser."""

from __future__ import annotations

import io
import json
import re
from collections import Counter
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from pipelines.contracts import REJECTS_PART
from pipelines.errors import ConfigError
from pipelines.evaluate.charts import COLOURS
from pipelines.evaluate.compare import Wanted, compare, contenders
from pipelines.evaluate.map import coloured, draw_map, positions
from pipelines.evaluate.protocols import Asked
from pipelines.evaluate.report import report
from pipelines.evaluate.report_page import curve
from pipelines.evaluate.retrieval import evaluate
from pipelines.evaluate.statistics import statistics
from pipelines.index.cache import Cache
from pipelines.index.manifest import Coding, CurvePoint, Latency, Recall, Release, Rerank
from pipelines.index.parts import unit
from pipelines.index.release import read_release
from pipelines.record import read_record
from pipelines.storage import Store
from tests.indexed import ENCODER, caption_of, captions_of, everything, write_output
from tests.unit.evaluate.browser import CHROMIUM, NO_BROWSER, look_at
from tests.unit.evaluate.outputs import describe, replace_vectors
from tests.unit.index.test_cache import Away
from tests.unit.index.test_rerank import Lossy
from tests.unit.test_search import write_release

PARTS, ROWS = 2, 200
NASTY = "<script>alert(1)</script> ' &"


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An output that has all that a report tells of."""
    root = tmp_path_factory.mktemp("reported")
    store = write_release(root / "out", parts=PARTS)
    write_output(root / "out", parts=PARTS, dim=8, seed=1, encoder="other-11111111")
    describe(root / "out")
    give_pictures(root)
    write_rejects(root / "out")
    write_run_report(root / "out")
    writecurve(store)
    write_training(root)
    evaluate(store, ENCODER, Asked(sample=40))
    evaluate(store, ENCODER, Asked(protocols=("label",), split="test", sample=40))
    evaluate(store, ENCODER, Asked(protocols=("captions",), fold=50))
    return root


def give_pictures(root: Path) -> None:
    """Every tenth is gone, and every caption tries to be markup."""
    for path in sorted((root / "out" / "samples").glob("*.parquet")):
        table = pq.read_table(path)
        uris, digests = [], []
        for row in table["row"].to_pylist():
            file = io.BytesIO()
            Image.new("RGB", (100, 60), (row, 255 - row, 40)).save(file, "PNG")
            picture = root / f"{path.stem}-{row}.png"
            if row % 10:
                picture.write_bytes(file.getvalue())
            uris.append(str(picture))
            digests.append(sha256(file.getvalue()).hexdigest())
        columns: dict[str, Any] = {
            "uri": pa.array(uris),
            "sha256": pa.array(digests),
            "offset": pa.nulls(len(uris), pa.int64()),
            "width": pa.array([100] * len(uris), pa.int32()),
            "height": pa.array([60] * len(uris), pa.int32()),
            "captions": pa.array([[NASTY] * captions_of(row) for row in table["row"].to_pylist()]),
        }
        for name, column in columns.items():
            table = table.set_column(table.schema.get_field_index(name), table.schema.field(name), column)
        pq.write_table(table, path)


def write_rejects(out: Path) -> None:
    """What the commits of tests.indexed count as rejected, named."""
    for path in (out / "commits" / ENCODER).glob("*.json"):
        commit = json.loads(path.read_text())
        commit["reasons"] = {"truncated_image": 3, "not_utf8": 1}
        path.write_text(json.dumps(commit))
    rows = [
        {
            "shard": "s",
            "row": at,
            "key": f"bad {at}",
            "modality": "image",
            "stage": "decode",
            "reason": reason,
            "detail": "<b>why</b>",
        }
        for at, reason in enumerate(["truncated_image"] * 3 + ["not_utf8"])
    ]
    target = out / "rejects" / ENCODER / "part-a.parquet"
    target.parent.mkdir(parents=True)
    pq.write_table(pa.Table.from_pylist(rows, schema=REJECTS_PART), target)


def write_run_report(out: Path) -> None:
    stages = {
        name: {"rows": 400.0, "seconds": 2.0, "rows_per_second": rate, "peak_mib": 100.0}
        for name, rate in (("read", 900.0), ("decode", 200.0), ("encode", 300.0), ("write", 500.0))
    }
    pace = [{"seconds": float(at), "rows": {"read": 50.0 * at, "write": 40.0 * at}} for at in range(1, 10)]
    for run in ("20260101T000000Z-00000000", "20260102T000000Z-00000000"):
        told = {"run": run, "seconds": 9.0, "shards": {"done_now": 2}, "stages": stages, "bottleneck": "decode"}
        told["pace"] = pace
        (out / "reports").mkdir(exist_ok=True)
        (out / "reports" / f"{run}.json").write_text(json.dumps(told))


def writecurve(store: Store) -> None:
    release = read_release(store, ENCODER, "image")
    figures = {f"recall@{k}": 0.9 for k in (1, 10, 100)}
    curve = tuple(
        CurvePoint(search_params=params, query_ms=0.1 * n, recall={"image": 0.2 * n}, reranked={"image": 0.24 * n})
        for n, params in enumerate(("nprobe=1", "", "nprobe=4"), 1)
    )
    told = release.model_copy(
        update={
            "recall": Recall(queries={"image": 10}, figures={"image": figures}, reranked={"image": figures}),
            "curve": curve,
            "latency": {"hits": Latency(queries=9, p50_ms=1.0, p95_ms=2.0, batch_ms=0.5)},
        }
    )
    store.put_atomic(f"{release.folder}/manifest.json", told.model_dump_json().encode())


def write_training(root: Path) -> None:
    """What a training job leaves beside its model, for one encoder."""
    made = root / "trained"
    made.mkdir()
    epochs = [
        {"epoch": at, "lr": 0.01, "loss": 1 / at, "text_to_image": {f"recall@{k}": at * k / 1e3 for k in (1, 5, 10)}}
        for at in range(1, 5)
    ]
    (made / "metrics.json").write_text(json.dumps({"finished": True, "best_epoch": 3, "epochs": epochs}))
    run = root / "out" / "run.json"
    record = json.loads(run.read_text())
    record["encoders"][ENCODER]["spec"]["reference"] = f"local-dir:{made / 'model'}"
    run.write_text(json.dumps(record))


@pytest.fixture(scope="module")
def pages(root: Path) -> dict[str, Path]:
    store = Store(str(root / "out"))
    compared = compare(contenders([store]), Wanted(k=4, agreed=20, shown=2))
    mapped = draw_map(store, ENCODER, sample=60)
    return {
        name: Path(each["page"]) for name, each in (("report", report(store)), ("compare", compared), ("map", mapped))
    }


def test_the_report_tells_what_the_output_has(root: Path, pages: dict[str, Path]) -> None:
    html = pages["report"].read_text()
    for told in (
        "truncated_image",
        "bad 0",
        "not_utf8",
        "bottleneck: decode",
        'aria-label="rows a second over time"',
        "label 3",
        "the model is of epoch 3 of 4",
        'aria-label="recall, caption to image"',
        "<td>text to image recall@10</td><td>0.03</td>",
        "recall@10",
        "captions: text → image",
        "Sample searches: text → image",
    ):
        assert told in html, told
    document = json.loads(pages["report"].with_name("report.json").read_text())
    assert document["samples"] == document["images"] == PARTS * ROWS
    assert [told["loss"] for told in document["training"][ENCODER]["epochs"]] == [1 / at for at in range(1, 5)]
    assert document["rejects"][ENCODER] == {"truncated_image": 3 * PARTS, "not_utf8": PARTS}
    names = [(each["protocol"], each["split"], each["fold"]) for each in document["evaluations"][ENCODER]]
    assert names == [("captions", None, 50), ("captions", None, None), ("label", None, None), ("label", "test", None)]
    assert document["indexes"][f"{ENCODER}/image"]["release"] == "v0001"
    assert document["runs"][0]["pace"][-1] == {"seconds": 9.0, "rows": {"read": 450.0, "write": 360.0}}
    assert [run["run"] for run in document["runs"]] == ["20260102T000000Z-00000000", "20260101T000000Z-00000000"]


def test_every_evaluation_is_on_the_page(pages: dict[str, Path]) -> None:
    html = pages["report"].read_text()
    document = json.loads(pages["report"].with_name("report.json").read_text())
    for told in (
        "<h3>captions: image → text, folds of 50</h3>",
        "<h3>label: image → image, split test</h3>",
        "queries in 50, mean of",
        "release v0001 holds",
        "have nothing to find",
        "<td>Precision@1</td>",
        "<td>Precision@10</td>",
        "<td>mean rank</td>",
    ):
        assert told in html, told
    for each in document["evaluations"][ENCODER]:
        assert f"made {each['made']}" in html


def test_report_json_has_what_the_page_shows(root: Path, pages: dict[str, Path]) -> None:
    store = Store(str(root / "out"))
    document = json.loads(pages["report"].with_name("report.json").read_text())
    release, told = read_release(store, ENCODER, "image"), document["indexes"][f"{ENCODER}/image"]
    assert (told["index_key"], told["search_params"]) == (release.index_key, release.search_params)
    assert told["bytes_per_vector"] == release.bytes_per_vector and told["query_ms"] == release.query_ms
    assert [CurvePoint(**point) for point in told["curve"]] == [*release.curve]
    assert told["latency"] == {name: each.model_dump() for name, each in release.latency.items()}
    assert document["encoders"][ENCODER]["fingerprint"] == read_record(store).encoders[ENCODER].fingerprint
    sides = document["statistics"]["sides"]
    assert sum(sides["counts"]) == PARTS * ROWS and len(sides["edges"]) == len(sides["counts"]) + 1
    examples = document["reject_examples"][ENCODER]
    assert [each["key"] for each in examples["truncated_image"]] == ["bad 0", "bad 1", "bad 2"]
    by_image, by_text = document["searches"][ENCODER]
    assert (by_image["asks"], by_text["asks"], by_image["release"]) == ("image", "text", "v0001")
    keys = {item.key for item in everything(root / "out", "image")[0]}
    for query in (*by_image["queries"], *by_text["queries"]):
        scores = [hit["score"] for hit in query["hits"]]
        assert query["key"] in keys and {hit["key"] for hit in query["hits"]} < keys
        assert len(scores) == 6 and scores == sorted(scores, reverse=True)
    assert all(query["key"] not in [hit["key"] for hit in query["hits"]] for query in by_image["queries"])


def test_the_curve_is_of_the_index_alone_and_re_ranked_with_a_ring_around_what_was_chosen(root: Path) -> None:
    release = read_release(Store(str(root / "out")), ENCODER, "image")
    rerank = Rerank(coding=Coding(dtype="float16"), factor=4, query_ms=0.1)
    alone, both = str(curve(release)), str(curve(release.model_copy(update={"rerank": rerank})))
    assert "on one thread" in alone and ("re-ranked" in alone, "re-ranked" in both) == (False, True)
    assert (alone.count("stroke-dasharray"), both.count("stroke-dasharray") > 0) == (0, True)
    unmeasured: Release = release.model_copy(update={"curve": ()})
    assert curve(unmeasured) is None


def test_what_samples_say_is_never_markup(pages: dict[str, Path]) -> None:
    for page in pages.values():
        html = page.read_text()
        assert "alert(1)" in html and "<script>alert" not in html and "<b>why" not in html


@pytest.mark.skipif(not CHROMIUM, reason=NO_BROWSER)
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("name", ["report", "compare", "map"])
def test_every_word_stands_out_from_the_page(name: str, dark: bool, pages: dict[str, Path], tmp_path: Path) -> None:
    seen = look_at(pages[name], tmp_path, dark)
    assert seen.paper < 0.05 if dark else seen.paper > 0.8
    # What WCAG asks of small text.
    assert seen.contrast >= 4.5, seen.faintest


@pytest.mark.skipif(not CHROMIUM, reason=NO_BROWSER)
@pytest.mark.parametrize("name", ["report", "compare"])
def test_a_browser_has_no_complaint_and_misses_no_image(name: str, pages: dict[str, Path], tmp_path: Path) -> None:
    seen = look_at(pages[name], tmp_path)
    assert seen.images > 9 and seen.missing == 0
    assert seen.console == [] and seen.requests == []


@pytest.mark.skipif(not CHROMIUM, reason=NO_BROWSER)
def test_the_map_shows_what_one_points_at(pages: dict[str, Path], tmp_path: Path) -> None:
    pointed = tmp_path / "pointed.html"
    point = "<script>document.querySelector('circle[data-image^=data]').dispatchEvent(new Event('focusin', {bubbles: true}))</script></body>"
    pointed.write_text(pages["map"].read_text().replace("</body>", point))
    seen = look_at(pointed, tmp_path)
    assert (seen.images, seen.missing, seen.console, seen.requests) == (1, 0, [], [])
    document = json.loads(pages["map"].with_name("map.json").read_text())
    assert len(document["points"]) == 60 and document["by"] == "label"


def test_a_caption_shows_its_own_words(tmp_path: Path) -> None:
    """Not those of the first of its sample."""
    store = write_output(tmp_path, parts=1, rows=30)
    items, _ = everything(tmp_path, "text")
    document = draw_map(store, ENCODER, "text")
    captions = re.findall(r'data-caption="([^"]*)"', Path(document["page"]).read_text())
    assert captions == [caption_of(0, item.row, item.caption_index or 0) for item in items]


@pytest.mark.parametrize("count", [1, len(COLOURS), len(COLOURS) + 1, 20])
def test_no_two_groups_of_a_map_share_a_colour_but_the_others(count: int) -> None:
    groups = Counter({f"group {at}": 100 - at for at in range(count)})
    legend, colours = coloured(groups)
    assert sum(number for _, _, number in legend) == groups.total() and len(legend) == min(count, len(COLOURS))
    assert len({colour for _, colour, _ in legend}) == len(legend)
    named = {name: colour for name, colour, _ in legend if name in groups}
    assert colours.items() >= named.items() and len(colours) == count
    assert {colours[name] for name in colours.keys() - named.keys()} <= {legend[-1][1]} - {*named.values()}
    assert count <= len(COLOURS) or legend[-1][0] == f"{count - len(COLOURS) + 1} others"


def test_a_map_keeps_groups_apart_and_is_seeded() -> None:
    random = np.random.default_rng(0)
    centres = np.repeat(random.normal(size=(3, 16)), 20, axis=0)
    vectors = (centres + 0.05 * random.normal(size=centres.shape)).astype(np.float32)
    found = positions(vectors, 0)
    own = np.repeat(np.arange(3), 20)
    apart = np.linalg.norm(found[:, None] - found, axis=2) + 9 * np.eye(60)
    assert (own[apart.argmin(axis=1)] == own).all() and np.array_equal(found, positions(vectors, 0))


def test_a_map_is_of_cosines_though_all_vectors_lean_one_way() -> None:
    """Two groups on either side of the mean are near each other, and far from those beyond them; centred, each would be
    near to what lies beyond it."""
    random = np.random.default_rng(0)
    angles = np.radians(np.repeat([-10.0, -1.0, 1.0, 10.0], 15))
    vectors = np.zeros((60, 16))
    vectors[:, 0], vectors[:, 1] = np.cos(angles), np.sin(angles)
    found = positions(unit(vectors + 5e-4 * random.normal(size=vectors.shape)), 0)
    left, near_left, near_right, right = found.reshape(4, 15, 2).mean(axis=1)
    between = np.linalg.norm(near_left - near_right)
    assert between < np.linalg.norm(left - near_left) and between < np.linalg.norm(right - near_right)


def test_a_map_is_the_same_whatever_the_length(tmp_path: Path) -> None:
    store = write_output(tmp_path, parts=1, rows=40)
    before = draw_map(store, ENCODER)["points"]
    replace_vectors(
        tmp_path / "embeddings" / ENCODER / "image",
        lambda vectors: vectors * 2.0 ** (np.arange(len(vectors)) % 5)[:, None],
    )
    assert draw_map(store, ENCODER)["points"] == before


def test_a_map_is_by_label_where_these_can_be_told_apart(tmp_path: Path) -> None:
    store = write_output(tmp_path, parts=1, rows=80)

    def by(**asked: Any) -> str:
        document = draw_map(store, ENCODER, **asked)
        assert all(("cluster" in point["group"]) == (document["by"] == "cluster") for point in document["points"])
        return str(document["by"])

    assert by() == "cluster"
    with pytest.raises(ConfigError, match="has a label"):
        by(by="label")
    describe(tmp_path, lambda row: (f"label {row % 50}", {}))
    assert (by(), by(by="cluster")) == ("label", "cluster")
    describe(tmp_path, lambda row: (f"label {row % 60}", {}))
    assert (by(), by(by="label")) == ("cluster", "label")


@pytest.mark.skipif(not CHROMIUM, reason=NO_BROWSER)
def test_the_browser_would_tell(tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    page.write_text(
        "<body><img src='gone.png'><img src='data:image/png;base64,AAAA'><script>console.error('x')</script>"
        "<p>plain</p><svg><text fill='#777' y='9'>grey</text></svg></body>"
    )
    seen = look_at(page, tmp_path)
    assert seen.contrast == pytest.approx(4.48, abs=0.01) and seen.faintest == "grey"
    assert (seen.images, seen.missing, seen.requests) == (2, 2, ["gone.png"])
    assert any("x" in line for line in seen.console)


def test_statistics_are_counted_part_by_part(root: Path) -> None:
    told = statistics(Store(str(root / "out")))
    captions = [captions_of(row) for row in range(ROWS)] * PARTS
    assert told.captions.tolist()[:4] == [captions.count(count) for count in range(4)]
    assert told.words.sum() == sum(captions) and told.sides.sum() == PARTS * ROWS
    assert sum(told.labels.values()) == sum(row % 10 != 9 for row in range(ROWS)) * PARTS


def test_files_of_an_index_elsewhere_are_kept(tmp_path: Path) -> None:
    away, cache = Away(Lossy(tmp_path / "made")), Cache(tmp_path / "cache", 2**30)
    report(away.store, cache=cache)
    assert {path.name for path in cache.folder.iterdir()} == {file.sha256 for file in away.made.release.files}


def test_an_output_with_next_to_nothing_has_a_report_too(tmp_path: Path) -> None:
    store = write_output(tmp_path, parts=1, rows=3)
    html = Path(report(store)["page"]).read_text()
    assert "No run has reported" in html and "exactly" in html and read_record(store).encoders
