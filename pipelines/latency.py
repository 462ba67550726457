"""What a search takes as a service has it: through the search client, with the release open, one query or many."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from time import perf_counter

import numpy as np

from pipelines.contracts import Modality
from pipelines.index.asked import read_asked
from pipelines.index.manifest import Latency, Release
from pipelines.index.parts import Vectors
from pipelines.search import Searcher
from pipelines.storage import Store

K = 10
QUERIES, TIMED_S = 200, 0.7
BATCH = 32
LARGEST_READ = 2**30
"""Bytes of a release elsewhere that is read into memory for this; a larger one is not timed."""

Search = Callable[[Vectors], object]


def latencies(store: Store, release: Release) -> dict[str, Latency]:
    """By what is asked for: ids as the index alone finds them (`index alone`), `re-ranked`, and as hits with keys,
    captions and places (`hits`), 10 of each. Empty for a large release in other storage.

    The queries are those that recall was measured with. Takes some seconds; memory: as of a search.
    """
    if store.local_path(release.folder) is None and sum(file.bytes for file in release.files) > LARGEST_READ:
        return {}
    queries = next(iter(read_asked(store, release).queries.kinds.values()))[:QUERIES]
    return {name: timed(search, queries) for name, search in ways(store, release)}


def ways(store: Store, release: Release) -> Iterator[tuple[str, Search]]:
    modality: Modality = release.modality  # type: ignore[assignment]
    alone = Searcher(store, release.encoder, modality, release, rerank=0)
    yield "index alone", lambda queries: alone.nearest(queries, K)
    best = Searcher(store, release.encoder, modality, release) if release.rerank else alone
    if release.rerank:
        yield "re-ranked", lambda queries: best.nearest(queries, K)
    yield "hits", lambda queries: best.search(queries, K)


def timed(search: Search, queries: Vectors) -> Latency:
    """queries: float32 [q, dim]. The first search, which may open what later ones find open, is not counted."""
    search(queries[:1])
    took = sorted(durations_ms(search, (queries[at : at + 1] for at in range(len(queries)))))
    batches = durations_ms(search, (np.resize(queries, (BATCH, queries.shape[1])) for _ in range(QUERIES)))
    return Latency(
        queries=len(took),
        p50_ms=round(float(np.percentile(took, 50)), 3),
        p95_ms=round(float(np.percentile(took, 95)), 3),
        batch_ms=round(float(np.mean(batches)) / BATCH, 3),
    )


def durations_ms(search: Search, asked: Iterator[Vectors]) -> list[float]:
    """Of one search after the other, until there are no more or TIMED_S is over."""
    found, started = list[float](), perf_counter()
    for queries in asked:
        before = perf_counter()
        search(queries)
        now = perf_counter()
        found.append(1e3 * (now - before))
        if now - started > TIMED_S:
            break
    return found
