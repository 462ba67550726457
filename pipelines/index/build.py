"""The build, top-down: choose → read → train → add → tune → recall → release → publish."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import ray

from pipelines.config import IndexConfig
from pipelines.contracts import Modality
from pipelines.errors import ConfigError, VecmillError
from pipelines.index.add import answer_task, fill_task, read_task, score_task
from pipelines.index.chart import svg
from pipelines.index.choose import holds_codes
from pipelines.index.measure import (
    CURVE_K,
    TIMED_QUERIES,
    Ask,
    Found,
    Samples,
    draw_samples,
    merged,
    require_whole,
    rerank_ms,
)
from pipelines.index.parts import BATCH_BYTES, Parts, Vectors, embeddings_folder, list_parts
from pipelines.index.plan import Plan, make_plan
from pipelines.index.publish import publish
from pipelines.index.queries import Queries, caption_queries, split_sample
from pipelines.index.recall import DEPTHS, Top, merge, without
from pipelines.index.release import (
    CHART,
    REPORT,
    Coding,
    CurvePoint,
    IndexShard,
    Recall,
    Release,
    Rerank,
    claim_version,
    current_version,
    finish,
    index_folder,
    newest_or_none,
    number_of,
    open_shard,
    publication,
    unfinished,
)
from pipelines.index.report import markdown
from pipelines.index.rerank import StoredVectors, learn_coding
from pipelines.index.room import require_room
from pipelines.index.train import train
from pipelines.index.tune import apply, around, least, query_ms, tune
from pipelines.lease import held
from pipelines.observe import Clock, peak_memory_mib
from pipelines.record import read_record
from pipelines.storage import Store, scratch_folder

Progress = Callable[[str], None]
K = max(DEPTHS)
CURVE_S = 0.3
"""Seconds that each of a curve's latencies is measured for."""
NOT_MEASURED = {"recall": Recall(queries={}, figures={})}


def build_index(
    store: Store,
    encoder: str,
    modality: Modality,
    settings: IndexConfig,
    progress: Progress = lambda line: None,
    force: bool = False,
) -> Release:
    """A new release of embeddings/<encoder>/<modality>, or the current one where nothing has changed since.

    It becomes the current one unless something bars it (`obstacles`), or a later build's is that already.
    Needs an initialised Ray. Memory: here the training sample, in each task one index shard and one
    batch of vectors. Raises: ConfigError, IndexBuildError, NotPublishedError.
    """
    fingerprint = recorded_fingerprint(store, encoder)
    latest = newest_or_none(store, encoder, modality)
    before = [part.name for part in latest.parts.ranges] if latest else []
    parts = list_parts(store, embeddings_folder(encoder, modality), before)
    if latest and not force and is_current(latest, parts, settings, fingerprint):
        progress(f"{latest.folder} is up to date: the same parts and settings (--force builds it again)")
        return settle(store, latest, settings, progress)
    require_one_vector(parts, encoder, modality)
    plan = make_plan(parts, settings)
    require_room(plan, store)
    # A name of its own: two builds may run at once, but nothing may be collected under them.
    with held(store, f"index/{encoder}.{modality}.{uuid.uuid4().hex[:12]}", "index", say=progress):
        return _publish(Build(store, encoder, modality, plan, settings), latest, fingerprint, progress)


def require_one_vector(parts: Parts, encoder: str, modality: Modality) -> None:
    """Raises: ConfigError for items of several vectors, which FAISS has no index for."""
    if parts.count > 1:
        raise ConfigError(
            f"embeddings/{encoder}/{modality} has {parts.count} vectors an item, compared by max-similarity: an index "
            "takes one each",
            "Search it with --exact, or embed with a pooling of one vector: "
            "?pool=mean_norm, ?pool=mean_raw or ?pool=first.",
        )


def _publish(build: Build, latest: Release | None, fingerprint: str, progress: Progress) -> Release:
    plan = build.plan
    progress(f"{plan.parts.rows:,} vectors of {plan.parts.dim} dimensions in {len(plan.parts.ranges)} parts")
    progress(f"{plan.key} in {len(plan.runs)} index shards → {build.folder}")
    for dead in unfinished(build.store, index_folder(build.encoder, build.modality)):
        if dead != build.version:
            progress(f"{dead} is unfinished: another build is at it, or died; if none runs, its folder can go")
    try:
        release = build.release(id_space(latest, plan.parts, progress), fingerprint, progress)
    except BaseException:
        build.store.delete_folder(build.folder)
        raise
    finally:
        build.store.delete_folder(build.staging)
    finish(build.store, release, publish=False)
    return settle(build.store, release, build.settings, progress)


def settle(store: Store, release: Release, settings: IndexConfig, progress: Progress) -> Release:
    """Publishes the newest release, unless it was so before: what was rolled back does not come again by itself."""
    home = index_folder(release.encoder, release.modality)
    current = current_version(store, home)
    if current and number_of(current) > number_of(release.version):
        progress(f"{current}, which another build began later, is the current release")
    elif current != release.version:
        known = publication(store, home, release.version)
        if known and known.withdrawn:
            progress(f"{current} is the current release: {release.version} was, and was rolled back")
        else:
            publish(store, release, settings.floor, settings.keep, progress)
    return release


def id_space(latest: Release | None, parts: Parts, progress: Progress) -> int:
    """The latest's while its ids stay valid, else the next."""
    if latest is None:
        return 1
    known = latest.parts.ranges
    if parts.ranges[: len(known)] == known:
        return latest.id_space
    progress("Parts of the latest release are gone or replaced: ids start anew")
    return latest.id_space + 1


def recorded_fingerprint(store: Store, encoder: str) -> str:
    """Raises: ConfigError naming the encoders that the output has."""
    known = read_record(store).encoders
    if encoder not in known:
        raise ConfigError(
            f"{store.uri()} has no encoder {encoder!r}", f"It has: {', '.join(sorted(known)) or 'none; embed first'}."
        )
    return known[encoder].fingerprint


def is_current(latest: Release, parts: Parts, settings: IndexConfig, fingerprint: str) -> bool:
    made_by = (latest.parts, _building(latest.settings), latest.fingerprint)
    return made_by == (parts, _building(settings.model_dump(mode="json")), fingerprint)


def _building(settings: dict[str, Any]) -> dict[str, Any]:
    """Without those that decide what becomes of a release."""
    return {name: value for name, value in settings.items() if name not in ("floor", "keep")}


class Build:
    """One attempt at a release: its place, its plan, and what its stages took."""

    def __init__(self, store: Store, encoder: str, modality: Modality, plan: Plan, settings: IndexConfig) -> None:
        self.store, self.encoder, self.modality = store, encoder, modality
        self.plan, self.settings = plan, settings
        self.attempt = uuid.uuid4().hex
        home = index_folder(encoder, modality)
        self.staging = f"staging/{home}/{self.attempt}"
        self.version = claim_version(store, home, self.attempt)
        self.folder = f"{home}/{self.version}"
        self.seconds: dict[str, float] = {}
        self.peak_mib: dict[str, float] = {}

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        clock = Clock()
        with clock.running():
            yield
        self.seconds[name] = round(clock.seconds, 3)
        self.peak_mib[name] = round(max(peak_memory_mib(), self.peak_mib.get(name, 0)), 1)

    def release(self, id_space: int, fingerprint: str, progress: Progress) -> Release:
        """Every stage but the last: all files but the manifest are in place."""
        with self.stage("read"):
            sample, queries = self.read(progress)
        with self.stage("train"):
            trained = self.train(sample)
            coding = learn_coding(self.plan.rerank, sample if len(sample) else queries.kinds[self.modality])
        del sample
        with self.stage("add"):
            shards, truth = self.add(trained, queries, coding, progress)
        with self.stage("tune"):
            params = self.settings.search_params
            if self.settings.target_recall:
                params = self.reaching(self.settings.target_recall, shards, queries, truth, coding, progress)
            tuned = self.tune(shards[0], queries, params)
        with self.stage("recall"):
            measured = self.measure(shards, tuned, queries, truth, coding)
        release = Release(
            version=self.version,
            id_space=id_space,
            encoder=self.encoder,
            modality=self.modality,
            fingerprint=fingerprint,
            metric=self.settings.metric,
            index_key=self.plan.key,
            search_params=tuned.params,
            query_ms=tuned.query_ms,
            parts=self.plan.parts,
            shards=tuple(shards),
            settings=self.settings.model_dump(mode="json"),
            seed=self.settings.seed,
            seconds=self.seconds,
            peak_mib=self.peak_mib,
            versions=versions(),
            made=f"{datetime.now(UTC):%Y-%m-%d %H:%M:%S} UTC",
            bytes_per_vector=bytes_per_vector(shards),
            **measured,
        )
        self.store.put_atomic(f"{self.folder}/{REPORT}", markdown(release).encode())
        if release.curve:
            self.store.put_atomic(f"{self.folder}/{CHART}", svg(release))
        return release

    def read(self, progress: Progress) -> tuple[Vectors, Queries]:
        """The training sample, float32 [n, dim], and the queries; each part's share read in its run's task."""
        drawn = self.plan.draw
        progress(f"reading {len(drawn.train):,} vectors to train on and {len(drawn.queries):,} to ask for")
        runs = zip(self.plan.run_parts(), self.plan.run_positions(), strict=True)
        refs = [read_task.remote(self.store, parts, positions) for parts, positions in runs]
        sample, own = split_sample(map(get, refs), drawn, self.plan.parts.dim)
        captions = caption_queries(self.store, self.encoder, self.plan.parts, self.settings)
        kinds: dict[str, Vectors] = {self.modality: own}
        if self.modality == "image" and captions is not None:
            kinds["text"] = captions
        return sample, Queries(kinds, drawn.ids(self.plan.parts)[drawn.queries])

    def train(self, sample: Vectors) -> str:
        """The path of the empty trained index that every index shard starts from."""
        index = train(self.plan.key, self.settings.metric, sample, self.plan.parts.dim)
        path = f"{self.staging}/trained.faiss"
        with scratch_folder() as scratch:
            local = Path(scratch) / "trained.faiss"
            faiss.write_index(index, str(local))
            self.store.put_atomic(path, local)
        return path

    def add(
        self, trained: str, queries: Queries, coding: Coding | None, progress: Progress
    ) -> tuple[list[IndexShard], Top]:
        task: Any = fill_task.options(memory=self.plan.task_bytes)
        asked = ray.put(queries.vectors[: None if self.settings.recall_queries else 0])
        targets = [f"{self.folder}/shard-{at:04d}.faiss" for at in range(len(self.plan.runs))]
        scratch, metric = self.plan.scratch_bytes, self.settings.metric
        refs = [
            task.remote(self.store, parts, trained, target, asked, K + 1, metric, coding, scratch)
            for parts, target in zip(self.plan.run_parts(), targets, strict=True)
        ]
        filled = []
        for ref in refs:
            filled.append(get(ref))
            progress(f"filled {filled[-1].shard.file}, {len(filled)} of {len(refs)}: {filled[-1].shard.rows:,} vectors")
        self.peak_mib["add"] = max(each.peak_mib for each in filled)
        return [each.shard for each in filled], merge([each.truth for each in filled], K + 1, self.settings.metric)

    def reaching(
        self,
        target: float,
        shards: list[IndexShard],
        queries: Queries,
        truth: Top,
        coding: Coding | None,
        progress: Progress,
    ) -> str:
        """The least parameters with which all index shards reach a recall@10, as search has it, of every kind of query.

        No clock decides. The furthest there are, and a word of it, where none does.
        """
        truth, recalls = without(truth, queries.own), dict[str, float]()

        def enough(several: list[str]) -> list[bool]:
            asks = [Ask(params, CURVE_K * self.factor(coding) + 1) for params in several]
            tops = self.ask(shards, asks, queries, Samples.none(self.plan.parts.dim), coding)
            for params, found in zip(several, self.found(shards, queries, tops, coding), strict=True):
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

    def tune(self, shard: IndexShard, queries: Queries, known: str | None) -> Tuned:
        """Parameters for all index shards, tuned on the first where none are known, and milliseconds a query takes.

        A search goes through the index shards one after the other, so that each has its rows' share
        of the target.
        """
        share = shard.rows / self.plan.parts.rows
        index = open_shard(self.store, self.folder, shard)
        params = known if known is not None else tune(index, self.plan.key, self.settings.max_query_ms * share)
        others = around(self.plan.key, params) if self.settings.recall_queries else []
        times = {}
        for each in [*others, params]:
            apply(index, each)
            times[each] = round(query_ms(index, queries.vectors, 1.0 if each == params else CURVE_S) / share, 3)
        return Tuned(params, times)

    def measure(
        self, shards: list[IndexShard], tuned: Tuned, queries: Queries, truth: Top, coding: Coding | None
    ) -> dict[str, Any]:
        """The fields of the release that tell what it finds, and that its ids lead back."""
        measured = bool(self.settings.recall_queries)
        queries = queries if measured else queries.first(TIMED_QUERIES)
        factor = self.factor(coding)
        curve = [Ask(params, CURVE_K * factor + 1) for params in tuned.times] if measured else []
        samples = draw_samples(self.store, self.plan.parts, self.settings.seed)
        tops = self.ask(shards, [Ask(tuned.params, K * factor + 1), *curve], queries, samples, coding)
        return {
            "rerank": self.rerank(shards, queries, tops[0], coding) if coding else None,
            "round_trips": len(samples.ids),
            **(self.figures(shards, tuned, queries, truth, tops, coding) if measured else NOT_MEASURED),
        }

    def figures(
        self,
        shards: list[IndexShard],
        tuned: Tuned,
        queries: Queries,
        truth: Top,
        tops: list[Top],
        coding: Coding | None,
    ) -> dict[str, Any]:
        """Recall and its curve, of what all index shards found: `tops` of the tuned parameters, then of the curve's."""
        truth, found = without(truth, queries.own), self.found(shards, queries, tops, coding)
        return {
            "recall": Recall(
                queries={kind: len(vectors) for kind, vectors in queries.kinds.items()},
                figures=found[0].figures(truth, queries),
                reranked=found[0].reranked(truth, queries),
            ),
            "curve": tuple(map(partial(curve_point, truth, queries), tuned.times.items(), found[1:])),
        }

    def factor(self, coding: Coding | None) -> int:
        return self.settings.rerank_factor if coding else 1

    def ask(
        self, shards: list[IndexShard], asks: list[Ask], queries: Queries, samples: Samples, coding: Coding | None
    ) -> list[Top]:
        """What all index shards together find, one an Ask, once each is known to hold the samples."""
        task, asked = answer_task.options(memory=self.plan.task_bytes), ray.put(queries.vectors)
        refs = [task.remote(self.store, self.folder, shard, asks, asked, samples, coding) for shard in shards]
        answers = (
            require_whole(self.store, self.folder, shard, get(ref)) for shard, ref in zip(shards, refs, strict=True)
        )
        return merged(answers, asks, self.settings.metric, queries.own)

    def found(self, shards: list[IndexShard], queries: Queries, tops: list[Top], coding: Coding | None) -> list[Found]:
        """The same with the scores of the stored vectors."""
        scores = self.scores(shards, ray.put(queries.vectors), tops, coding) if coding else [None] * len(tops)
        exact = all(shard.side and shard.side.exact for shard in shards) if coding else not holds_codes(self.plan.key)
        metric, factor = self.settings.metric, self.factor(coding)
        return [Found(top, score, metric, factor, exact) for top, score in zip(tops, scores, strict=True)]

    def scores(self, shards: list[IndexShard], asked: Any, tops: list[Top], coding: Coding) -> list[Vectors]:
        """Of each top's candidates by their stored vectors, NaN for none."""
        candidates: Any = ray.put([top.ids for top in tops])
        # Candidates as they come, those of one index shard, and their scores; and a batch of vectors.
        task = score_task.options(memory=4 * BATCH_BYTES + 3 * sum(top.ids.nbytes for top in tops))
        refs = [
            task.remote(self.store, self.folder, shard, coding, self.settings.metric, asked, candidates)
            for shard in shards
        ]
        best = [np.full(top.ids.shape, np.nan, np.float32) for top in tops]
        for ref in refs:
            # Each candidate is in one index shard; where it is not, fmax takes the number there is.
            best = [np.fmax(one, two) for one, two in zip(best, get(ref), strict=True)]
        return best

    def rerank(self, shards: list[IndexShard], queries: Queries, found: Top, coding: Coding) -> Rerank:
        stored = StoredVectors(self.store, self.folder, shards, coding, self.plan.parts.dim)
        factor = self.settings.rerank_factor
        took = rerank_ms(queries.vectors, found, stored, factor, self.settings.metric)
        return Rerank(coding=coding, factor=factor, query_ms=took)


@dataclass(frozen=True)
class Tuned:
    """params: those chosen. times: milliseconds a query by parameters, these and others around them."""

    params: str
    times: dict[str, float]

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


def bytes_per_vector(shards: list[IndexShard]) -> dict[str, float]:
    rows = sum(shard.rows for shard in shards)
    sides = [shard.side.bytes for shard in shards if shard.side]
    sizes = {"index": sum(shard.bytes for shard in shards), **({"rerank": sum(sides)} if sides else {})}
    return {name: round(size / rows, 3) for name, size in sizes.items()}


def get(ref: Any) -> Any:
    """A task's result; our own errors as they were raised, without Ray's wrapping."""
    try:
        return ray.get(ref)
    except ray.exceptions.RayTaskError as error:
        raise (error.cause if isinstance(error.cause, VecmillError) else error) from None


def versions() -> dict[str, str]:
    named = {library: version(library) for library in ("vecmill", "autofaiss", "numpy", "pyarrow", "ray")}
    return {**named, "faiss": str(faiss.__version__)}
