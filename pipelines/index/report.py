"""`report.md` of a release: what it holds, what it finds and at what cost, for people."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from pipelines.index.drift import Drift
from pipelines.index.manifest import CHART, CurvePoint, Release, Variant, Variants
from pipelines.index.recall import DEPTHS

FIGURES = [*(f"recall@{k}" for k in DEPTHS), *(f"1-recall@{k}" for k in DEPTHS if k > 1)]


def markdown(release: Release) -> str:
    """The figures of the manifest as tables; the curve as a chart too, which `chart` draws."""
    found = [_recall(release), _curve(release)] if release.recall.queries else [_not_measured(release)]
    compared = [_variants(release, release.variants)] if release.variants else []
    timed = [_latency(release)] if release.latency else []
    sections = [_facts(release), *found, *timed, *compared, _costs(release)]
    return "\n\n".join([f"# {release.folder}", *("\n".join(section) for section in sections)]) + "\n"


def _facts(release: Release) -> Iterator[str]:
    yield f"- made {release.made}: {release.parts.standing:,} vectors of {release.parts.dim} dimensions"
    yield f"- {len(release.shards)} index shards, {sum(file.bytes for file in release.files):,} bytes"
    yield f"- key `{release.index_key}`, metric {release.metric}, parameters `{release.search_params or 'none'}`"
    if gone := release.parts.rows - release.parts.standing:
        yield f"- {gone:,} more vectors, in {len(release.parts.gone):,} parts that are gone, are never found"
    if release.grown_from:
        yield f"- grown from {release.grown_from}{_drift_of(release)}"
    if release.batch_query_ms:
        yield f"- {release.query_ms:.2f} ms a query alone on one thread, {release.batch_query_ms:.2f} of 32 at once"
    for name, size in release.bytes_per_vector.items():
        held = release.rerank.coding.dtype if release.rerank and name == "rerank" else "the index itself"
        yield f"- {size:,.1f} bytes a vector: {name} ({held})"
    yield f"- {release.round_trips} sampled ids led back to their part, row, key and vector"


def _drift_of(release: Release) -> str:
    return f"; {drift_line(release.drift)}" if release.drift else ""


def drift_line(found: Drift) -> str:
    return f"error of the {found.of}: {found.new:.4f} for new vectors, {found.old:.4f} for old ({found.ratio:.2f}x)"


def _recall(release: Release) -> Iterator[str]:
    yield "## Recall\n"
    yield "Of queries that were not trained on, against exact search of all vectors. recall@k: share of the exact k "
    yield "nearest among the k found. 1-recall@k: how often the nearest of all is among them.\n"
    if release.grown_from:
        yield "Recall of `new` kinds is of queries drawn from what was added, against exact search of the index shards "
        yield "filled for it, which alone are asked: a search of the whole finds others. The floor is not for these.\n"
    yield from table(["queries", "", *FIGURES, "ms a query", "bytes a vector"])
    for kind, count in release.recall.queries.items():
        for how, figures, ms, size in rows_of(release, kind):
            cells = [f"{figures[name]:.3f}" for name in FIGURES]
            yield _row([f"{kind} ({count:,})", how, *cells, f"{ms:.2f}", f"{size:,.1f}"])


def _not_measured(release: Release) -> Iterator[str]:
    yield "## Recall\n"
    yield f"Not measured (index.recall_queries is 0). {release.query_ms:.2f} ms a query."


def rows_of(release: Release, kind: str) -> Iterator[tuple[str, dict[str, float], float, float]]:
    """(how, recall by depth, milliseconds a query, bytes a vector) of the index alone, and re-ranked."""
    size = release.bytes_per_vector
    yield "index alone", release.recall.figures[kind], release.query_ms, size.get("index", 0)
    if release.rerank and kind in release.recall.reranked:
        ms = release.query_ms + release.rerank.query_ms
        yield f"re-ranked x{release.rerank.factor}", release.recall.reranked[kind], ms, sum(size.values())


def _curve(release: Release) -> Iterator[str]:
    yield "## Recall and latency\n"
    yield f"![recall@10 over milliseconds a query]({CHART})\n"
    yield "recall@10 with other search parameters; one query at a time, all index shards one after the other.\n"
    kinds = list(release.recall.queries)
    extra = [f"{kind} re-ranked" for kind in kinds] if release.rerank else []
    more = release.rerank.query_ms if release.rerank else 0.0
    yield from table(["parameters", "ms a query", *(["ms re-ranked"] if extra else []), *kinds, *extra])
    for point in release.curve:
        times = [point.query_ms, *([point.query_ms + more] if extra else [])]
        mark = " (chosen)" if point.search_params == release.search_params else ""
        yield _row(
            [f"`{point.search_params or 'none'}`{mark}", *(f"{ms:.2f}" for ms in times), *_figures(point, kinds)]
        )


def _figures(point: CurvePoint, kinds: Sequence[str]) -> Iterator[str]:
    for found in (point.recall, point.reranked):
        yield from (f"{found[kind]:.3f}" for kind in kinds if kind in found)


def _latency(release: Release) -> Iterator[str]:
    yield "## Searching it\n"
    yield "Through the search client with the release open, 10 of each query: ids as the index alone finds them, "
    yield "re-ranked with stored vectors where there are any, and as hits with keys, captions and places.\n"
    yield from table(["", "queries", "p50 ms", "p95 ms", "ms each of 32 at once"])
    for way, each in release.latency.items():
        yield _row([way, f"{each.queries:,}", *(f"{ms:.2f}" for ms in (each.p50_ms, each.p95_ms, each.batch_ms))])


def _variants(release: Release, compared: Variants) -> Iterator[str]:
    kinds = list(compared.queries)
    asked = " and ".join(f"{count:,} {kind}" for kind, count in compared.queries.items())
    yield "## Other keys\n"
    yield f"Each trained on, and filled with, the same {compared.vectors:,} vectors, sampled as {compared.version} was "
    yield f"built; {asked} queries, against exact search of these vectors. Of fewer vectors "
    yield "more is found: compare the keys with each other, not with the tables above. Re-ranked: the best of "
    yield f"{compared.factor} candidates a hit by whole vectors, whose bytes are not counted.\n"
    if any(row.metric != compared.metric for row in compared.rows):
        yield "These vectors have length 1, so that l2 orders them as ip does: keys of l2 take `--metric l2`.\n"
    heads = [f"{kind} {name}" for kind in kinds for name in ("recall@1", "recall@10", "recall@10 re-ranked")]
    yield from table(["key", "metric", "bytes a vector", *heads, "ms a query", "of 32 at once", "training s"])
    for row in compared.rows:
        mark = " (this index)" if row.key == release.index_key else ""
        params = f" `{row.search_params}`" if row.search_params else ""
        costs = [f"{row.query_ms:.3f}", f"{row.batch_query_ms:.3f}", f"{row.train_s:,.1f}"]
        found = (f"{value:.3f}" for kind in kinds for value in found_of(row, kind))
        yield _row([f"`{row.key}`{params}{mark}", row.metric, f"{row.bytes_per_vector:,.1f}", *found, *costs])


def found_of(row: Variant, kind: str) -> tuple[float, float, float]:
    """recall@1 and recall@10 of the key alone, and recall@10 re-ranked."""
    alone = row.recall[kind]
    return alone["recall@1"], alone["recall@10"], row.reranked[kind]["recall@10"]


def _costs(release: Release) -> Iterator[str]:
    yield "## Building it\n"
    yield from table(["stage", "seconds", "peak MiB of a process"])
    for stage, seconds in release.seconds.items():
        yield _row([stage, f"{seconds:,.1f}", f"{release.peak_mib.get(stage, 0):,.0f}"])


def table(heads: Sequence[str]) -> Iterator[str]:
    yield _row(heads)
    yield _row(["---"] * len(heads))


def _row(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"
