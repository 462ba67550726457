"""A build's index shards, asked in tasks that open one each: how far to look, what it finds, and what it takes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from shutil import disk_usage
from typing import Any

import numpy as np
import ray

from pipelines.config import IndexConfig
from pipelines.index.add import answer_task, results, score_task
from pipelines.index.asked import Asked
from pipelines.index.cache import Cache, opened_shard
from pipelines.index.choose import holds_codes
from pipelines.index.manifest import Coding, CurvePoint, IndexShard, Recall, Rerank
from pipelines.index.measure import (
    CURVE_K,
    TIMED_QUERIES,
    Answers,
    Ask,
    Found,
    Samples,
    draw_samples,
    merged,
    rerank_ms,
)
from pipelines.index.parts import BATCH_BYTES, Vectors
from pipelines.index.plan import Plan
from pipelines.index.queries import Queries
from pipelines.index.recall import DEPTHS, Top, without
from pipelines.index.rerank import StoredVectors
from pipelines.index.selection import standing
from pipelines.index.tune import apply, around, batch_query_ms, least, query_ms, tune
from pipelines.storage import Store, scratch_folder

K = max(DEPTHS)
NOT_MEASURED = {"recall": Recall(queries={}, figures={})}
Heard = Callable[[IndexShard, Answers], Answers]


class Measuring:
    """All index shards of a build, of `folder`, with their stored vectors, of `coding`, where there are any.

    heard: sees what each index shard answers, and says what of it counts.
    """

    def __init__(
        self,
        store: Store,
        folder: str,
        shards: list[IndexShard],
        plan: Plan,
        settings: IndexConfig,
        coding: Coding | None,
        heard: Heard,
    ) -> None:
        self.store, self.folder, self.shards = store, folder, shards
        self.plan, self.settings, self.coding, self.heard = plan, settings, coding, heard

    def reaching(self, target: float, asked: Asked, progress: Callable[[str], None]) -> str:
        """The least parameters with which all index shards reach a recall@10, as search has it, of every kind of query.

        The furthest there are, and a word of it, where none does.
        """
        queries, recalls = asked.queries, dict[str, float]()
        truth = without(asked.truth, queries.own)

        def enough(several: list[str]) -> list[bool]:
            asks = [Ask(params, CURVE_K * self.factor + 1) for params in several]
            tops = self.ask(asks, queries, Samples.none(self.plan.parts.dim))
            for params, found in zip(several, self.found(queries, tops), strict=True):
                figures = found.reranked(truth, queries, [CURVE_K]) or found.figures(truth, queries, [CURVE_K])
                recalls[params] = min(each[f"recall@{CURVE_K}"] for each in figures.values())
            return [recalls[params] >= target for params in several]

        chosen = least(self.plan.key, enough)
        if recalls.get(chosen, 1.0) < target:
            progress(
                f"recall@10 is {recalls[chosen]:.3f} as far as a search can look ({chosen}): the target of {target:g} "
                "takes a larger index.index_key or index.rerank_factor"
            )
        return chosen

    def tune(self, queries: Queries, decided: str | None) -> Tuned:
        """Parameters for all index shards, tuned on the first where none are decided, and milliseconds a query takes.

        A search goes through the index shards one after the other, so that each has its rows' share
        of the target. It is mapped, as searches have it: one in other storage from a copy, where the disk has twice
        the room.
        """
        with scratch_folder() as scratch:
            copies = Cache(Path(scratch), disk_usage(scratch).free // 2, optional=True)
            return self._tuned(
                opened_shard(self.store, self.folder, self.shards[0], self.plan.key, copies), queries, decided
            )

    def _tuned(self, index: Any, queries: Queries, decided: str | None) -> Tuned:
        share = self.shards[0].rows / self.plan.parts.rows
        params = tune(index, self.plan.key, self.settings.max_query_ms * share) if decided is None else decided
        others = around(self.plan.key, params) if self.settings.recall_queries else []
        times = {}
        for each in [*others, params]:
            apply(index, each)
            times[each] = round(query_ms(index, queries.vectors) / share, 3)
        # The parameters chosen were set last.
        return Tuned(params, times, round(batch_query_ms(index, queries.vectors) / share, 3))

    def measure(self, tuned: Tuned, asked: Asked) -> dict[str, Any]:
        """The fields of the release that tell what it finds, and that its ids lead back."""
        measured = bool(self.settings.recall_queries)
        queries = asked.queries if measured else asked.queries.first(TIMED_QUERIES)
        curve = [Ask(params, CURVE_K * self.factor + 1) for params in tuned.times] if measured else []
        samples = draw_samples(self.store, self.plan.parts, self.settings.seed)
        tops = self.ask([Ask(tuned.params, K * self.factor + 1), *curve], queries, samples)
        return {
            "rerank": self.rerank(queries, tops[0]) if self.coding else None,
            "round_trips": len(samples.ids),
            **(self.figures(tuned, asked, tops) if measured else NOT_MEASURED),
        }

    def figures(self, tuned: Tuned, asked: Asked, tops: list[Top]) -> dict[str, Any]:
        """Recall and its curve, of what all index shards found: `tops` of the tuned parameters, then of the curve's."""
        queries = asked.queries
        truth, found = without(asked.truth, queries.own), self.found(queries, tops)
        return {
            "recall": Recall(
                queries={kind: len(vectors) for kind, vectors in queries.kinds.items()},
                figures=found[0].figures(truth, queries),
                reranked=found[0].reranked(truth, queries),
            ),
            "curve": tuple(map(partial(curve_point, truth, queries), tuned.times.items(), found[1:])),
        }

    @property
    def factor(self) -> int:
        return self.settings.rerank_factor if self.coding else 1

    def ask(self, asks: list[Ask], queries: Queries, samples: Samples) -> list[Top]:
        """What all index shards together find, one an Ask, once each is known to hold the samples."""
        task: Any = answer_task.options(memory=self.plan.task_bytes)
        rest = (asks, ray.put(queries.vectors), samples, self.coding, standing(self.plan.parts))
        told = results(partial(task.remote, self.store, self.folder, shard, *rest) for shard in self.shards)
        answers = (self.heard(shard, answer) for shard, answer in zip(self.shards, told, strict=True))
        return merged(answers, asks, self.settings.metric, queries.own)

    def found(self, queries: Queries, tops: list[Top]) -> list[Found]:
        """The same with the scores of the stored vectors."""
        scores = self.scores(ray.put(queries.vectors), tops) if self.coding else [None] * len(tops)
        exact = (
            all(shard.side and shard.side.exact for shard in self.shards)
            if self.coding
            else not holds_codes(self.plan.key)
        )
        metric, factor = self.settings.metric, self.factor
        return [Found(top, score, metric, factor, exact) for top, score in zip(tops, scores, strict=True)]

    def scores(self, asked: Any, tops: list[Top]) -> list[Vectors]:
        """Of each top's candidates by their stored vectors, NaN for none."""
        assert self.coding is not None
        candidates: Any = ray.put([top.ids for top in tops])
        # Candidates as they come, those of one index shard, and their scores; and a batch of vectors.
        task = score_task.options(memory=4 * BATCH_BYTES + 3 * sum(top.ids.nbytes for top in tops))
        rest = (self.coding, self.settings.metric, asked, candidates)
        best = [np.full(top.ids.shape, np.nan, np.float32) for top in tops]
        for scores in results(partial(task.remote, self.store, self.folder, shard, *rest) for shard in self.shards):
            # Each candidate is in one index shard; where it is not, fmax takes the number there is.
            best = [np.fmax(one, two) for one, two in zip(best, scores, strict=True)]
        return best

    def rerank(self, queries: Queries, found: Top) -> Rerank:
        assert self.coding is not None
        stored = StoredVectors(self.store, self.folder, self.shards, self.coding, self.plan.parts.dim)
        took = rerank_ms(queries.vectors, found, stored, self.factor, self.settings.metric)
        return Rerank(coding=self.coding, factor=self.factor, query_ms=took)


@dataclass(frozen=True)
class Tuned:
    """params: those chosen. times: milliseconds a query of one thread by parameters, these and others around them.

    batch_query_ms: a query with those chosen, of a batch that is asked at once on all threads.
    """

    params: str
    times: dict[str, float]
    batch_query_ms: float

    @property
    def query_ms(self) -> float:
        return self.times[self.params]


def curve_point(truth: Top, queries: Queries, timed: tuple[str, float], found: Found) -> CurvePoint:
    def at_10(figures: dict[str, dict[str, float]]) -> dict[str, float]:
        return {kind: figure[f"recall@{CURVE_K}"] for kind, figure in figures.items()}

    return CurvePoint(
        search_params=timed[0],
        query_ms=timed[1],
        recall=at_10(found.figures(truth, queries, [CURVE_K])),
        reranked=at_10(found.reranked(truth, queries, [CURVE_K])),
    )
