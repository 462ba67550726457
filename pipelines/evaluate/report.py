"""One page that says what an output is: what went in and came out, how fast, how good, and what it finds."""

from __future__ import annotations

import json
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from pipelines.contracts import Modality
from pipelines.errors import VecmillError
from pipelines.evaluate.charts import COLOURS, figure, svg
from pipelines.evaluate.groups import Groups
from pipelines.evaluate.items import ItemPlace, collect, draw, stored
from pipelines.evaluate.pages import markup, page, shown
from pipelines.evaluate.retrieval import kept_at, require_comparable
from pipelines.evaluate.statistics import CAPTIONS, SIDES, WORDS, Statistics, statistics
from pipelines.evaluate.thumbnails import samples_at, thumbnails
from pipelines.index.cache import Cache
from pipelines.index.manifest import Release
from pipelines.index.parts import open_part
from pipelines.index.recall import DEPTHS
from pipelines.index.release import latest_or_none
from pipelines.index.report import rows_of
from pipelines.index.trace import Origin, trace_parts
from pipelines.ledger import tally
from pipelines.record import EncoderRecord, read_record
from pipelines.search import Hit, Searcher
from pipelines.storage import Store, is_whole_json
from pipelines.training.curves import Lines, draw_panel, flattened, panels

EXAMPLES, SEARCHES, HITS, RUNS, LABELS = 3, 4, 6, 20, 20
OF_A_RUN = ("run", "seconds", "shards", "stages", "bottleneck", "pace")
LEAST_POINTS, INTERVALS = 3, 60
STAGES = ("read", "translate", "decode", "encode", "write")
FIGURES = ("recall@1", "recall@5", "recall@10", "ndcg@10", "map", "median_rank")
PAGE, DATA = "report.html", "report.json"
METRICS = "metrics.json"
"""That a training job writes."""


def report(store: Store, folder: str = "report", seed: int = 0, cache: Cache | None = None) -> dict[str, Any]:
    """Writes `report.html`, which loads nothing from anywhere, and `report.json`; returns what the latter holds.

    Memory: a part of samples or rejects, a batch of vectors, and an index shard. Nothing is embedded. cache: of files
    of the index, as `Searcher` takes it.
    """
    record = read_record(store)
    told = statistics(store)
    runs = list(_runs(store))
    counts = {encoder: tally(store, [encoder]) for encoder in record.encoders}
    rejects = {encoder: reasons for encoder, (_, reasons, _) in counts.items()}
    document: dict[str, Any] = {
        "output": store.uri(),
        "made": f"{datetime.now(UTC):%Y-%m-%d %H:%M:%S} UTC",
        "samples": told.samples,
        "images": told.images,
        "items": {name: {m: c.model_dump() for m, c in items.items()} for name, (items, _, _) in counts.items()},
        "rejects": rejects,
        "labels": dict(told.labels.most_common(LABELS)),
        "runs": [
            {name: run.get(name) for name in ("run", "seconds", "shards", "stages", "bottleneck", "pace")}
            for run in runs
        ],
        "evaluations": {encoder: found for encoder in record.encoders if (found := _json(store, kept_at(encoder)))},
        "training": {
            encoder: history for encoder, each in record.encoders.items() if (history := _history(store, each))
        },
        "indexes": {
            f"{encoder}/{release.modality}": {"release": release.version, "recall": release.recall.model_dump()}
            for encoder, each in record.encoders.items()
            for release in _releases(store, encoder, each)
        },
    }
    html = page(
        "report.html",
        title=store.uri(),
        made=document["made"],
        samples=f"{told.samples:,}",
        runs=runs,
        counts=_counts(document["items"]),
        rejects=[each for encoder, reasons in rejects.items() for each in _rejects(store, encoder, reasons)],
        stages=_stages(runs),
        run_rows=[_run_row(run) for run in runs],
        encoders=[_card(store, encoder, each, document, seed, cache) for encoder, each in record.encoders.items()],
        data_charts=_data_charts(told),
        labels=[[label, f"{count:,}"] for label, count in document["labels"].items()],
    )
    store.put_atomic(f"{folder}/{PAGE}", html)
    store.put_atomic(f"{folder}/{DATA}", json.dumps(document, indent=2).encode())
    return {**document, "page": store.uri(f"{folder}/{PAGE}")}


def _json(store: Store, path: str) -> dict[str, Any] | None:
    try:
        found = json.loads(store.read(path, is_whole_json))
    except FileNotFoundError:
        return None
    return found if isinstance(found, dict) else None


def _runs(store: Store) -> Iterator[dict[str, Any]]:
    """What the last runs reported, the newest first."""
    names = sorted((name for name in store.names("reports") if name.endswith(".json")), reverse=True)
    for name in names[:RUNS]:
        if found := _json(store, f"reports/{name}"):
            yield found


def _releases(store: Store, encoder: str, record: EncoderRecord) -> list[Release]:
    found = [latest_or_none(store, encoder, modality) for modality in record.modalities]
    return [release for release in found if release]


def _counts(items: dict[str, Any]) -> list[list[str]]:
    names = ("items", "embedded", "rejected", "removed", "absent")
    return [
        [encoder, modality, *(f"{counts[name]:,}" for name in names)]
        for encoder, by_modality in items.items()
        for modality, counts in by_modality.items()
    ]


def _rejects(store: Store, encoder: str, reasons: dict[str, int]) -> list[dict[str, Any]]:
    """By reason, the commonest first, with a few of each; parts are read until there are enough."""
    examples: dict[str, list[dict[str, Any]]] = {reason: [] for reason in reasons}
    for name in sorted(store.names(f"rejects/{encoder}")):
        if all(len(examples[reason]) >= min(EXAMPLES, count) for reason, count in reasons.items()):
            break
        with open_part(store, f"rejects/{encoder}/{name}") as stream:
            for each in pq.read_table(stream, columns=["key", "modality", "reason", "detail"]).to_pylist():
                if len(examples.setdefault(each["reason"], [])) < EXAMPLES:
                    examples[each["reason"]].append(each)
    ordered = sorted(reasons.items(), key=lambda item: (-item[1], item[0]))
    return [{"reason": reason, "count": f"{count:,}", "examples": examples[reason]} for reason, count in ordered]


def _stages(runs: list[dict[str, Any]]) -> dict[str, Any] | None:
    """Of the last run that did something."""
    run = next((run for run in runs if run.get("stages")), None)
    if run is None:
        return None
    known = [(name, run["stages"][name]) for name in STAGES if name in run["stages"]]
    with figure(5, 0.5 + 0.42 * len(known), for_page=True) as drawn:
        axes = drawn.subplots()
        rates = [numbers.get("rows_per_second", 0) for _, numbers in known]
        slowest = [COLOURS[1 if name == run.get("bottleneck") else 0] for name, _ in known]
        bars = axes.barh([name for name, _ in known], rates, color=slowest, height=0.6)
        axes.bar_label(bars, [f"{rate:,.0f}" for rate in rates], padding=3)
        axes.invert_yaxis()
        axes.set_xlabel("rows a second of work; the bottleneck in orange")
        axes.margins(x=0.15)
        chart = markup(svg(drawn, "rows a second by stage"))
    cells = ("rows", "seconds", "rows_per_second", "peak_mib")
    rows = [[name, *(f"{numbers.get(cell, 0):,.1f}".removesuffix(".0") for cell in cells)] for name, numbers in known]
    facts = {"run": run["run"], "bottleneck": run.get("bottleneck")}
    return {"chart": chart, "rows": rows, "pace": _pace(run.get("pace") or []), **facts}


def _pace(points: list[dict[str, Any]]) -> Any:
    """Rows a second of each stage over the run's time; None of a run that was too short to have any."""
    if len(points) < LEAST_POINTS:
        return None
    seconds = np.array([0.0, *(point["seconds"] for point in points)])
    # Stages take their rows in blocks: of intervals shorter than those, most have none and some have all.
    edges = np.linspace(0, seconds[-1], 1 + min(INTERVALS, len(points) // LEAST_POINTS))
    with figure(9, 2.8, for_page=True) as drawn:
        axes = drawn.subplots()
        for stage in (name for name in STAGES if name in points[-1]["rows"]):
            done = np.interp(edges, seconds, [0, *(point["rows"].get(stage, 0) for point in points)])
            axes.stairs(np.diff(done) / np.diff(edges), edges, label=stage, linewidth=1.4)
        axes.set(xlabel="seconds since the run began", ylabel="rows a second", xlim=(0, seconds[-1]))
        axes.set_ylim(bottom=0)
        axes.grid(axis="y")
        axes.legend(loc="center left", bbox_to_anchor=(1, 0.5))
        return markup(svg(drawn, "rows a second over time"))


def _run_row(run: dict[str, Any]) -> list[str]:
    rows, seconds = run.get("stages", {}).get("write", {}).get("rows", 0), run.get("seconds") or 0
    rate = f"{rows / seconds:,.1f}" if seconds else "–"
    return [run["run"], f"{run.get('shards', {}).get('done_now', 0):,}", f"{rows:,.0f}", f"{seconds:,.1f}", rate]


def _card(
    store: Store, encoder: str, record: EncoderRecord, document: dict[str, Any], seed: int, cache: Cache | None
) -> dict[str, Any]:
    return {
        "name": encoder,
        "facts": _facts(record),
        "quality": [_quality(result) for result in document["evaluations"].get(encoder, {}).get("results", [])],
        "indexes": [_index(release) for release in _releases(store, encoder, record)],
        "searches": list(_searches(store, encoder, record, seed, cache)),
        "training": _training(history) if (history := document["training"].get(encoder)) else None,
    }


def _facts(record: EncoderRecord) -> list[list[str]]:
    spec = record.spec
    vectors = [f"{name}: {told['dim']} ({told['space']})" for name, told in spec["vectors"].items()]
    image = spec.get("image") or {}
    size = " x ".join(str(side) for side in image.get("size") or [])
    facts = {
        "model": spec["name"],
        "vectors": ", ".join(vectors),
        "precision": f"{spec.get('precision')}, written as {spec.get('dtype')}",
        "unit norm": "yes" if spec.get("normalize") else "no",
        "images": f"{image.get('resize')} to {size}, {image.get('resample')}" if image else "",
        "captions": f"at most {spec['context_length']} tokens" if spec.get("context_length") else "",
        "batch size": str(record.batch_size),
        "weights": spec["weights"][:16],
        "fingerprint": record.fingerprint,
        "versions": ", ".join(f"{name} {number}" for name, number in record.versions.items()),
    }
    return [[name, value] for name, value in facts.items() if value]


def _history(store: Store, record: EncoderRecord) -> dict[str, Any] | None:
    """What the job that made the model has left beside the model's folder: its address, and every epoch's figures."""
    _, _, folder = str(record.spec["reference"]).rpartition("local-dir:")
    home = Store(folder.rstrip("/").rpartition("/")[0], store.options)
    try:
        told = _json(home, METRICS) if home.root else None
    except VecmillError:
        # The model is of a place that this report cannot look into.
        return None
    return {"folder": home.uri(), **told} if told and told.get("epochs") else None


def _training(history: dict[str, Any]) -> dict[str, Any]:
    """Curves of all epochs, and the figures of the one that the model is of."""
    epochs = history["epochs"]
    best = next((told for told in epochs if told["epoch"] == history.get("best_epoch")), epochs[-1])
    return {
        "charts": [_curves(title, lines) for title, lines in panels(epochs).items()],
        "figures": [[name.replace("_", " "), f"{value:.4g}"] for name, value in flattened(best).items()],
        "epoch": f"epoch {best['epoch']} of {len(epochs)}",
        "folder": history["folder"],
    }


def _curves(title: str, lines: Lines) -> Any:
    with figure(4, 2.8, for_page=True) as drawn:
        draw_panel(drawn.subplots(), title, lines)
        return markup(svg(drawn, title))


def _quality(result: dict[str, Any]) -> dict[str, Any]:
    through = result["through"]
    columns = [("exact", result["figures"])]
    if through:
        columns += [("in index", through["found"]), ("exact there", through["exact"]), ("loss", through["loss"])]
    rows = [[name.replace("_", " "), *(_cell(name, told) for _, told in columns)] for name in FIGURES]
    told = f"{result['queries']:,} of {result['of']:,} queries in {result['gallery']:,}"
    title = f"{result['protocol']}: {result['asks']} → {result['finds']}"
    return {"title": title, "told": told, "rows": rows, "head": ["", *(name for name, _ in columns)]}


def _cell(name: str, told: dict[str, float]) -> str:
    if name not in told:
        return ""
    return f"{told[name]:,.1f}" if name.endswith("rank") else f"{told[name]:.4f}"


def _index(release: Release) -> dict[str, Any]:
    facts = {
        "vectors": f"{release.parts.rows:,} of {release.parts.dim} dimensions",
        "key": release.index_key,
        "parameters": release.search_params or "none",
        "bytes a vector": f"{sum(release.bytes_per_vector.values()):,.1f}",
        "made": release.made,
    }
    recall = [
        [f"{kind} {how}", *(f"{figures[f'recall@{k}']:.3f}" for k in DEPTHS), f"{ms:.2f}"]
        for kind in release.recall.queries
        for how, figures, ms, _ in rows_of(release, kind)
    ]
    return {
        "modality": release.modality,
        "version": release.version,
        "facts": [list(item) for item in facts.items()],
        "recall": recall,
        "recall_head": ["queries", *(f"@{k}" for k in DEPTHS), "ms"],
        "chart": _curve(release),
    }


def _curve(release: Release) -> Any:
    """Recall@10 against milliseconds a query, a line for each kind of query."""
    with figure(5, 3, for_page=True) as drawn:
        axes = drawn.subplots()
        points = sorted(release.curve, key=lambda point: point.query_ms)
        for kind in release.recall.queries:
            known = [(point.query_ms, point.recall[kind]) for point in points if kind in point.recall]
            if known:
                axes.plot(*zip(*known, strict=True), marker="o", markersize=4, label=f"{kind} queries")
        axes.set(xlabel="milliseconds a query", ylabel="recall@10", ylim=(0, 1.05))
        axes.set_xlim(left=0)
        axes.grid()
        if axes.lines:
            axes.legend(loc="lower right")
        return markup(svg(drawn, "recall against latency"))


def _searches(
    store: Store, encoder: str, record: EncoderRecord, seed: int, cache: Cache | None
) -> Iterator[dict[str, Any]]:
    """With vectors that are stored: images find others; captions find images, their own framed."""
    if "image" not in record.modalities:
        return
    for asks in record.modalities:
        try:
            require_comparable(store, encoder, asks, "image")
            yield _search(store, encoder, asks, seed, cache)
        except VecmillError:
            # An output without vectors, of several vectors an item, or of another space has no such search.
            continue


def _search(store: Store, encoder: str, asks: Modality, seed: int, cache: Cache | None) -> dict[str, Any]:
    asking = stored(store, encoder, asks, Groups(store))
    ids, _ = draw(asking, SEARCHES, seed)
    queries = collect(asking, ids, 2**14)
    release = latest_or_none(store, encoder, "image")
    searcher = Searcher(store, encoder, "image", exact=release is None, resident=False, cache=cache)
    asked = trace_parts(store, asking.parts, ids.tolist())
    answers = searcher.search(queries.vectors, HITS + 1)
    rows = [_answer(store, asks, *each) for each in zip(asked, answers, strict=True)]
    how = f"through release {release.version}" if release else "exactly"
    return {"title": f"Sample searches: {asks} → image, {how}", "rows": rows}


def _answer(store: Store, asks: Modality, asked: Origin, hits: list[Hit]) -> dict[str, Any]:
    own = (asked.shard, asked.row)
    kept = [hit for hit in hits if asks == "text" or (hit.shard, hit.row) != own][:HITS]
    [sample, *found] = samples_at(store, [ItemPlace(each.part, each.row) for each in (asked, *kept)])
    [small, *pictures] = thumbnails(store, [sample, *found])
    return {
        "asked": asked.caption or asked.key,
        "query": None if asks == "text" else shown(sample, small),
        "hits": [
            {**shown(each, picture, f"{hit.score:.3f}"), "own": (hit.shard, hit.row) == own}
            for hit, each, picture in zip(kept, found, pictures, strict=True)
        ],
    }


def _data_charts(told: Statistics) -> list[Any]:
    charts = []
    for title, label, counts, edges, logarithmic in (
        ("Image size", "shorter side, pixels", told.sides, SIDES, True),
        ("Caption length", "words", told.words, WORDS, False),
        ("Captions a sample", "captions", told.captions, CAPTIONS, False),
    ):
        if counts.sum():
            charts.append(_histogram(title, label, counts, edges, logarithmic))
    return charts


def _histogram(title: str, label: str, counts: Any, edges: Any, logarithmic: bool) -> Any:
    filled = np.flatnonzero(counts)
    first, last = max(0, filled[0] - 1), min(len(counts), filled[-1] + 2)
    with figure(4, 2.4, for_page=True) as drawn:
        axes = drawn.subplots()
        axes.stairs(counts[first:last], edges[first : last + 1], fill=True, color=COLOURS[0])
        axes.set(title=title, xlabel=label)
        if logarithmic:
            axes.set_xscale("log")
        axes.margins(y=0.1)
        return markup(svg(drawn, title))
