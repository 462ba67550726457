"""The page of a report: its document in tables, charts and pictures."""

from __future__ import annotations

from typing import Any

import numpy as np

from pipelines.contracts import Modality
from pipelines.evaluate.charts import COLOURS, figure, svg
from pipelines.evaluate.kept import TITLES, sentence
from pipelines.evaluate.pages import markup, page, shown
from pipelines.evaluate.searches import Answer, SampleSearch, of_one_sample
from pipelines.evaluate.thumbnails import thumbnails
from pipelines.index.chart import draw
from pipelines.index.manifest import Release
from pipelines.index.recall import DEPTHS
from pipelines.index.report import rows_of
from pipelines.storage import Store
from pipelines.training.curves import Lines, draw_panel, flattened, panels

LEAST_POINTS, INTERVALS = 3, 60
STAGES = ("read", "translate", "decode", "encode", "write")
CHARTS = {
    "sides": ("Image size", "shorter side, pixels", True),
    "words": ("Caption length", "words", False),
    "captions": ("Captions a sample", "captions", False),
}
"""Of the statistics: title, axis, and whether this is logarithmic."""


def written(document: dict[str, Any], runs: list[dict[str, Any]], cards: list[dict[str, Any]]) -> bytes:
    """The whole page, by the document. runs: what the last runs reported, the newest first. cards: by `card`."""
    return page(
        "report.html",
        title=document["output"],
        made=document["made"],
        samples=f"{document['samples']:,}",
        runs=runs,
        counts=_counts(document["items"]),
        rejects=[each for encoder in document["rejects"] for each in _rejects(document, encoder)],
        stages=_stages(runs),
        run_rows=[_run_row(run) for run in runs],
        encoders=cards,
        data_charts=_data_charts(document["statistics"]),
        labels=[[label, f"{count:,}"] for label, count in document["labels"].items()],
    )


def _counts(items: dict[str, Any]) -> list[list[str]]:
    names = ("items", "embedded", "rejected", "removed", "absent")
    return [
        [encoder, modality, *(f"{counts[name]:,}" for name in names)]
        for encoder, by_modality in items.items()
        for modality, counts in by_modality.items()
    ]


def _rejects(document: dict[str, Any], encoder: str) -> list[dict[str, Any]]:
    """By reason, the commonest first."""
    examples = document["reject_examples"][encoder]
    ordered = sorted(document["rejects"][encoder].items(), key=lambda item: (-item[1], item[0]))
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


def card(
    store: Store, encoder: str, document: dict[str, Any], releases: list[Release], searches: list[SampleSearch]
) -> dict[str, Any]:
    """What the page says of one encoder. releases: the current ones of its indexes."""
    return {
        "name": encoder,
        "facts": document["encoders"][encoder].items(),
        "quality": [_quality(run, result) for run in document["evaluations"][encoder] for result in run["results"]],
        "indexes": [_index(release, document["indexes"][f"{encoder}/{release.modality}"]) for release in releases],
        "searches": [_search(store, search) for search in searches],
        "training": _training(history) if (history := document["training"].get(encoder)) else None,
    }


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


def _quality(run: dict[str, Any], result: dict[str, Any]) -> dict[str, Any]:
    """Of a direction of what an evaluation has left."""
    through = result["through"]
    columns = [("exact", result["figures"])]
    if through:
        columns += [("in index", through["found"]), ("exact there", through["exact"]), ("loss", through["loss"])]
    rows = [[title, *(_cell(name, told) for _, told in columns)] for name, title in TITLES.items()]
    title = f"{result['protocol']}: {result['asks']} → {result['finds']}"
    of = [f"split {run['split']}"] if run["split"] is not None else []
    of += [f"folds of {run['fold']:,}"] if run["fold"] else []
    of += [f"identities by {run['identity']}"] if run["protocol"] == "identity" else []
    return {
        "title": ", ".join([title, *of]),
        "told": f"{sentence(result)}; made {run['made']}",
        "rows": rows,
        "head": ["", *(name for name, _ in columns)],
    }


def _cell(name: str, told: dict[str, float]) -> str:
    if name not in told:
        return ""
    return f"{told[name]:,.1f}" if name.endswith("rank") else f"{told[name]:.4f}"


def _index(release: Release, told: dict[str, Any]) -> dict[str, Any]:
    """told: of the release, in the document."""
    facts = {
        "vectors": f"{told['vectors']:,} of {told['dim']} dimensions",
        "key": told["index_key"],
        "parameters": told["search_params"] or "none",
        "bytes a vector": f"{sum(told['bytes_per_vector'].values()):,.1f}",
        "made": told["made"],
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
        "chart": curve(release),
    }


def curve(release: Release) -> Any:
    """Recall@10 against milliseconds a query; None where neither was measured."""
    if not release.curve:
        return None
    with figure(5, 3.4, for_page=True) as drawn:
        axes = drawn.subplots()
        draw(axes, release)
        axes.grid()
        drawn.legend(loc="outside lower center", ncols=2)
        return markup(svg(drawn, "recall against latency"))


def _search(store: Store, search: SampleSearch) -> dict[str, Any]:
    """With pictures; among what captions find, their own is framed."""
    how = f"through release {search.release}" if search.release else "exactly"
    rows = [_answer(store, search.asks, answer) for answer in search.answers]
    return {"title": f"Sample searches: {search.asks} → image, {how}", "rows": rows}


def _answer(store: Store, asks: Modality, answer: Answer) -> dict[str, Any]:
    [asking, *found] = zip(answer.samples, thumbnails(store, answer.samples), strict=True)
    return {
        "asked": answer.asked.caption or answer.asked.key,
        "query": None if asks == "text" else shown(*asking),
        "hits": [
            {**shown(*each, f"{hit.score:.3f}"), "own": of_one_sample(hit, answer.asked)}
            for hit, each in zip(answer.hits, found, strict=True)
        ],
    }


def _data_charts(histograms: dict[str, Any]) -> list[Any]:
    return [
        _histogram(title, label, np.array(histograms[name]["counts"]), histograms[name]["edges"], logarithmic)
        for name, (title, label, logarithmic) in CHARTS.items()
        if any(histograms[name]["counts"])
    ]


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
