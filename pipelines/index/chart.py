"""The curve of a release as a chart: recall over the time that a query takes."""

from __future__ import annotations

from collections.abc import Iterator
from io import BytesIO
from typing import Any

from pipelines.index.manifest import Release

# Okabe and Ito's, which the colour-blind tell apart too. One a kind of query.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7")


def svg(release: Release) -> bytes:
    """A line for each kind of query, of the index alone (dashed) and re-ranked; a ring around what was chosen.

    Dark on its own white ground, so that it can be read on a page of any colour. The same for the same figures.
    """
    # matplotlib takes a second to import, and nothing else needs it.
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context({"svg.hashsalt": "vecmill", "svg.fonttype": "path", "font.size": 11}):
        figure = Figure(figsize=(7, 4.6), layout="constrained", facecolor="white")
        axes = figure.subplots()
        draw(axes, release)
        axes.grid(which="both", color="#dddddd", linewidth=0.6)
        figure.legend(loc="outside lower center", ncols=2)
        drawn = BytesIO()
        figure.savefig(drawn, format="svg", metadata={"Date": None})
    return drawn.getvalue()


def draw(axes: Any, release: Release) -> None:
    """The curve and its scales, in whatever style the figure has; a line for each of `lines`, a ring around its chosen
    point."""
    from matplotlib.ticker import LogLocator, NullFormatter

    for label, colour, dashed, points, chosen in lines(release):
        milliseconds, recall = zip(*points, strict=True)
        axes.plot(milliseconds, recall, "o--" if dashed else "o-", color=colour, label=label, markersize=4)
        axes.plot(*chosen, "o", color=colour, fillstyle="none", markersize=11, clip_on=False)
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel("milliseconds a query on one thread (ring: the parameters chosen)")
    axes.set_ylabel("recall@10")
    axes.set_ylim(0, 1.03)


Point = tuple[float, float]


def lines(release: Release) -> Iterator[tuple[str, str, bool, list[Point], Point]]:
    """(label, colour, whether of the index alone beside a re-ranked one, its points by time, the chosen one)."""
    more = release.rerank.query_ms if release.rerank else 0.0
    for kind, colour in zip(release.recall.queries, COLOURS, strict=False):
        alone = {point.search_params: (point.query_ms, point.recall[kind]) for point in release.curve}
        yield f"{kind} queries", colour, bool(release.rerank), sorted(alone.values()), alone[release.search_params]
        if release.rerank:
            better = {each.search_params: (each.query_ms + more, each.reranked[kind]) for each in release.curve}
            chosen = better[release.search_params]
            yield f"{kind} queries, re-ranked", colour, False, sorted(better.values()), chosen
