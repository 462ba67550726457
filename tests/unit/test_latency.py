"""What a search takes is measured of the searches that users make, and of no others."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from pipelines import latency
from pipelines.index.asked import Asked, keep_asked
from pipelines.index.manifest import Release
from pipelines.index.queries import Queries
from pipelines.index.recall import exact
from pipelines.index.report import markdown
from pipelines.latency import BATCH, latencies, timed, ways
from pipelines.storage import Store
from tests.unit.index.test_rerank import Lossy


def asked_of(made: Lossy) -> Release:
    """Its release, with the queries that it was measured with."""
    truth = exact(made.queries, [(0, made.vectors)], 11, "ip")
    queries = Queries({"image": made.queries}, np.full(len(made.queries), -1))
    kept = keep_asked(made.store, made.release.folder, Asked.of(queries, truth, 11, "ip"))
    return made.release.model_copy(update={"asked": kept})


def test_each_way_of_searching_is_timed(tmp_path: Path) -> None:
    made = Lossy(tmp_path)
    release = asked_of(made)
    found = latencies(made.store, release)
    assert list(found) == ["index alone", "re-ranked", "hits"]
    for each in found.values():
        assert each.queries == len(made.queries) and 0 < each.p50_ms <= each.p95_ms and each.batch_ms > 0
    report = markdown(release.model_copy(update={"latency": found}))
    for way, each in found.items():
        assert f"| {way} | {each.queries} | {each.p50_ms:.2f} | {each.p95_ms:.2f} | {each.batch_ms:.2f} |" in report


def test_they_are_what_users_ask_for(tmp_path: Path) -> None:
    made = Lossy(tmp_path)
    asked = dict(ways(made.store, asked_of(made)))
    alone, best, hits = (asked[way](made.queries) for way in ("index alone", "re-ranked", "hits"))
    assert (alone.scores != best.scores).any()  # type: ignore[attr-defined]
    assert [[hit.id for hit in row] for row in hits] == best.ids.tolist()  # type: ignore[attr-defined]


def test_figures_are_those_of_the_searches(monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock that each search moves on by what it is said to take: 1 … 40 ms alone, 64 ms a batch."""
    now, alone, sizes = [0.0], iter([5.0, *range(1, 41)]), list[int]()

    def search(queries: np.ndarray) -> None:
        sizes.append(len(queries))
        now[0] += (next(alone) if len(queries) == 1 else 64) / 1e3

    monkeypatch.setattr(latency, "perf_counter", lambda: now[0])
    monkeypatch.setattr(latency, "TIMED_S", 10.0)
    found = timed(search, np.zeros((40, 4), np.float32))
    assert (found.queries, found.p50_ms, found.p95_ms, found.batch_ms) == (40, 20.5, 38.05, 2)
    assert sizes[:41] == [1] * 41 and set(sizes[41:]) == {BATCH}


def test_a_large_release_elsewhere_is_not_read_for_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = Lossy(tmp_path)
    monkeypatch.setattr(latency, "LARGEST_READ", 10)
    assert latencies(Store("memory://elsewhere"), made.release) == {}
