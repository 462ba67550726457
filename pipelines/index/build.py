"""The build, top-down: choose → read → train → add → tune → recall → release → publish."""

from __future__ import annotations

import hashlib
import json
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import version
from itertools import chain
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import ray

from pipelines.compact import compact_parts
from pipelines.config import IndexConfig
from pipelines.contracts import Modality
from pipelines.errors import ConfigError, IndexBuildError, VecmillError
from pipelines.index.add import answer_task, fill_task, read_task, score_task
from pipelines.index.asked import Asked, keep_asked
from pipelines.index.attempt import Attempt, Filled, Learnt, attempted
from pipelines.index.chart import svg
from pipelines.index.choose import holds_codes
from pipelines.index.measure import (
    CURVE_K,
    TIMED_QUERIES,
    Answers,
    Ask,
    Found,
    Samples,
    draw_samples,
    merged,
    require_whole,
    rerank_ms,
)
from pipelines.index.parts import BATCH_BYTES, Ids, Parts, Vectors, embeddings_folder, list_parts, pick
from pipelines.index.plan import Plan, make_plan
from pipelines.index.publish import delete_superseded, make_current, require_publishable
from pipelines.index.queries import Queries, caption_queries, split_sample
from pipelines.index.recall import DEPTHS, Top, empty_top, merge, without
from pipelines.index.release import (
    CHART,
    REPORT,
    TRAINED,
    Coding,
    CurvePoint,
    IndexShard,
    KeptFile,
    Recall,
    Release,
    Rerank,
    Variants,
    advance,
    claim_id_space,
    current_version,
    finish,
    finished,
    index_folder,
    newest_or_none,
    number_of,
    open_shard,
    publication,
    read_release,
    sha256_of,
    unfinished,
)
from pipelines.index.report import markdown
from pipelines.index.rerank import StoredVectors, learn_coding
from pipelines.index.room import DiskFullError, require_room
from pipelines.index.selection import standing
from pipelines.index.train import train
from pipelines.index.tune import apply, around, batch_query_ms, least, query_ms, tune
from pipelines.index.variants import compare
from pipelines.lease import held
from pipelines.observe import Clock, peak_memory_mib
from pipelines.record import read_record
from pipelines.storage import Store, scratch_folder
from pipelines.takedowns import read_takedowns

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
    drop_removed(store, progress)
    latest = newest_or_none(store, encoder, modality)
    before = [part.name for part in latest.parts.ranges] if latest and not latest.parts.gone else []
    parts = list_parts(store, embeddings_folder(encoder, modality), before)
    if latest and not force and is_current(latest, parts, settings, fingerprint):
        progress(f"{latest.folder} is up to date: the same parts and settings (--force builds it again)")
        return settle(store, latest, settings, progress)
    require_one_vector(parts, encoder, modality)
    plan = make_plan(parts, settings)
    with attempt_at(store, encoder, modality, digest_of(plan, settings, fingerprint), progress) as attempt:
        require_room(plan, attempt)
        build = Build(attempt, encoder, modality, plan, settings)
        return build_and_settle(build, kept_id_space(latest, parts, progress), fingerprint, progress)


@contextmanager
def attempt_at(store: Store, encoder: str, modality: str, digest: str, progress: Progress) -> Iterator[Attempt]:
    """A version for one build, whose files nothing collects meanwhile."""
    # A name of its own: two builds may run at once.
    with (
        held(store, f"index/{encoder}.{modality}.{uuid.uuid4().hex[:12]}", "index", say=progress),
        attempted(store, index_folder(encoder, modality), digest, progress) as attempt,
    ):
        yield attempt


def digest_of(plan: Plan, settings: IndexConfig, fingerprint: str, grown_from: str | None = None) -> str:
    """Of all that decides what is built."""
    decided = {
        "parts": plan.parts.model_dump(),
        "key": plan.key,
        "runs": [[run.start, run.stop] for run in plan.runs],
        "rerank": plan.rerank,
        "settings": _building(settings.model_dump(mode="json")),
        "fingerprint": fingerprint,
        "versions": versions(),
        "grown_from": grown_from,
    }
    return hashlib.sha256(json.dumps(decided, sort_keys=True).encode()).hexdigest()


def drop_removed(store: Store, progress: Progress) -> None:
    """Writes the parts again that hold what was taken down; the ids of an index of the new ones start anew."""
    if len(read_takedowns(store).touched(waiting=True)):
        with held(store, f"remove/{uuid.uuid4().hex[:12]}", "index", say=progress):
            compact_parts(store, lambda holding: progress(f"wrote {holding.told} again: taken down"), waiting=True)


def require_one_vector(parts: Parts, encoder: str, modality: Modality) -> None:
    """Raises: ConfigError for items of several vectors, which FAISS has no index for."""
    if parts.count > 1:
        raise ConfigError(
            f"embeddings/{encoder}/{modality} has {parts.count} vectors an item, compared by max-similarity: an index "
            "takes one each",
            "Search it with --exact, or embed with a pooling of one vector: "
            "?pool=mean_norm, ?pool=mean_raw or ?pool=first.",
        )


def build_and_settle(build: Build, id_space: int | None, fingerprint: str, progress: Progress) -> Release:
    """id_space: None for one that there never was."""
    plan = build.plan
    filled = plan.new_parts
    progress(f"{filled.rows:,} vectors of {filled.dim} dimensions in {len(filled.ranges)} parts")
    progress(f"{plan.key} in {len(plan.runs)} index shards → {build.folder}")
    for dead in unfinished(build.store, index_folder(build.encoder, build.modality)):
        if dead != build.version:
            progress(
                f"{dead} is unfinished: another build is at it, or died; if none runs, `vecmill collect` clears it"
            )
    try:
        release = build.release(id_space or 0, fingerprint, progress)
    except DiskFullError:
        raise
    except (ConfigError, IndexBuildError):
        # What is wrong with its parts will still be so; whatever else ended it, the next build goes on from here.
        build.attempt.clear()
        raise
    if id_space is None:
        release = release.model_copy(update={"id_space": fresh_id_space(build)})
    try:
        require_own_ids(build.store, release)
    except IndexBuildError:
        build.attempt.clear()
        raise
    finish(build.store, release, publish=False)
    build.store.delete_folder(build.attempt.staging)
    return settle(build.store, release, build.settings, progress)


def settle(store: Store, release: Release, settings: IndexConfig, progress: Progress) -> Release:
    """Publishes the newest release, unless it was so before: what was rolled back does not come again by itself."""
    if not _had_its_turn(store, release, progress):
        require_publishable(store, release, settings.floor)
        # Looked at again: that took a while, in which another build may have been published.
        if not _had_its_turn(store, release, progress):
            make_current(store, release, settings.keep, progress, advance)
    elif current_version(store, index_folder(release.encoder, release.modality)) == release.version:
        # Whoever made it so may have died before this was through.
        delete_superseded(store, release, settings.keep, progress)
    return release


def _had_its_turn(store: Store, release: Release, progress: Progress) -> bool:
    """Whether it is the current release, was and was rolled back, or a later build is."""
    home = index_folder(release.encoder, release.modality)
    current, known = current_version(store, home), publication(store, home, release.version)
    if current and number_of(current) > number_of(release.version):
        progress(f"{current}, which another build began later, is the current release")
        return True
    if current != release.version and known and known.withdrawn:
        progress(f"{current} is the current release: {release.version} was, and was rolled back")
        return True
    return current == release.version


def require_own_ids(store: Store, release: Release) -> None:
    """Raises: IndexBuildError where another build, that ran at the same time, gave these ids to other vectors."""
    ours = release.parts.ranges
    for each in finished(store, index_folder(release.encoder, release.modality)):
        other = read_release(store, release.encoder, release.modality, each)
        pairs = zip(ours, other.parts.ranges, strict=False)
        if other.id_space == release.id_space and any(
            (one.name, one.rows) != (two.name, two.rows) for one, two in pairs
        ):
            raise IndexBuildError(
                f"{other.folder}, which was built at the same time, has other vectors under the ids of this one",
                "Run the same command again: it goes on from there.",
            )


def fresh_id_space(build: Build) -> int:
    newest = newest_or_none(build.store, build.encoder, build.modality)
    return claim_id_space(build.store, build.attempt.home, newest.id_space + 1 if newest else 1)


def kept_id_space(latest: Release | None, parts: Parts, progress: Progress) -> int | None:
    """The latest's while its ids stay valid."""
    if latest is None:
        return None
    known = latest.parts.ranges
    if parts.ranges[: len(known)] == known:
        return latest.id_space
    progress("Parts of the latest release are gone or replaced: ids start anew")
    return None


def recorded_fingerprint(store: Store, encoder: str) -> str:
    """Raises: ConfigError naming the encoders that the output has."""
    known = read_record(store).encoders
    if encoder not in known:
        raise ConfigError(
            f"{store.uri()} has no encoder {encoder!r}", f"It has: {', '.join(sorted(known)) or 'none; embed first'}."
        )
    return known[encoder].fingerprint


def is_current(latest: Release, parts: Parts, settings: IndexConfig, fingerprint: str) -> bool:
    made_by = (latest.parts, _building(_with_defaults(latest.settings)), latest.fingerprint)
    same = made_by == (parts, _building(settings.model_dump(mode="json")), fingerprint)
    return same and (settings.variants == "none" or latest.settings.get("variants") == settings.variants)


def _with_defaults(settings: dict[str, Any]) -> dict[str, Any]:
    """Those of today, of a release that was made before some of them were known."""
    return {**IndexConfig().model_dump(mode="json"), **settings}


def _building(settings: dict[str, Any]) -> dict[str, Any]:
    """Without those that decide what becomes of a release, or what else is told of it."""
    told = ("floor", "keep", "variants", "variant_vectors")
    return {name: value for name, value in settings.items() if name not in told}


class Build:
    """One attempt at a release: its place, its plan, and what its stages took."""

    def __init__(self, attempt: Attempt, encoder: str, modality: Modality, plan: Plan, settings: IndexConfig) -> None:
        self.attempt, self.encoder, self.modality = attempt, encoder, modality
        self.store, self.version, self.folder = attempt.store, attempt.version, attempt.folder
        self.plan, self.settings = plan, settings
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
        learnt, queries = self.learnt(progress)
        coding = learnt.coding
        with self.stage("add"):
            shards, asked = self.add(learnt, queries, progress)
        with self.stage("tune"):
            tuned = self.tune(shards, queries, self.decided(shards, asked, coding, progress))
        with self.stage("recall"):
            measured = self.measure(shards, tuned, asked, coding)
        variants = self.variants(tuned, queries, progress)
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
            batch_query_ms=tuned.batch_query_ms,
            parts=self.plan.parts,
            shards=tuple(shards),
            settings=self.settings.model_dump(mode="json"),
            seed=self.settings.seed,
            seconds=self.seconds,
            peak_mib=self.peak_mib,
            versions=versions(),
            made=f"{datetime.now(UTC):%Y-%m-%d %H:%M:%S} UTC",
            bytes_per_vector=bytes_per_vector(shards),
            trained=learnt.trained,
            asked=keep_asked(self.store, self.folder, self.kept(asked)),
            variants=variants,
            **self.grown(learnt, queries, progress),
            **measured,
        )
        self.store.put_atomic(f"{self.folder}/{REPORT}", markdown(release).encode())
        if release.curve:
            self.store.put_atomic(f"{self.folder}/{CHART}", svg(release))
        return release

    def learnt(self, progress: Progress) -> tuple[Learnt, Queries]:
        """What index shards are filled with, and asked; of an attempt that was taken up, what it had."""
        if known := self.attempt.learnt():
            self.seconds, self.peak_mib = known[0].seconds, known[0].peak_mib
            progress("it was trained before")
            return known
        with self.stage("read"):
            sample, queries = self.read(progress)
        with self.stage("train"):
            trained = self.train(sample)
            coding = learn_coding(self.plan.rerank, sample if len(sample) else queries.kinds[self.modality])
        learnt = Learnt(trained=trained, coding=coding, seconds=self.seconds, peak_mib=self.peak_mib)
        self.attempt.keep_learnt(learnt, queries)
        return learnt, queries

    def read(self, progress: Progress) -> tuple[Vectors, Queries]:
        """The training sample, float32 [n, dim], and the queries; each part's share read in its run's task."""
        drawn = self.plan.draw
        progress(f"reading {len(drawn.train):,} vectors to train on and {len(drawn.queries):,} to ask for")
        sample, own = split_sample(self.read_at(drawn.positions), drawn, self.plan.parts.dim)
        captions = caption_queries(self.store, self.encoder, self.plan.new_parts, self.settings)
        kinds: dict[str, Vectors] = {self.modality: own}
        if self.modality == "image" and captions is not None:
            kinds["text"] = captions
        return sample, Queries(kinds, drawn.ids(self.plan.parts)[drawn.queries])

    def read_at(self, positions: Sequence[Ids]) -> Iterator[Vectors]:
        """float32 [n, dim] of each run of parts, whose sorted positions of each part are given."""
        runs = zip(self.plan.run_parts(), self.plan.runs, strict=True)
        refs = [read_task.remote(self.store, parts, positions[run.start : run.stop]) for parts, run in runs]
        return map(get, refs)

    def train(self, sample: Vectors) -> KeptFile:
        """The empty trained index that every index shard starts from."""
        index = train(self.plan.key, self.settings.metric, sample, self.plan.parts.dim)
        with scratch_folder() as scratch:
            local = Path(scratch) / TRAINED
            faiss.write_index(index, str(local))
            self.store.put_atomic(f"{self.folder}/{TRAINED}", local)
            return KeptFile(file=TRAINED, bytes=local.stat().st_size, sha256=sha256_of(local))

    def add(self, learnt: Learnt, queries: Queries, progress: Progress) -> tuple[list[IndexShard], Asked]:
        """The index shards, and the exact nearest of each query."""
        names = [f"shard-{at:04d}.faiss" for at in range(len(self.plan.runs))]
        shards, truth = self.filled(names, learnt, queries, progress)
        return shards, Asked.of(queries, truth, K + 1, self.settings.metric)

    def filled(
        self, names: list[str], learnt: Learnt, queries: Queries, progress: Progress
    ) -> tuple[list[IndexShard], Top]:
        """An index shard of each run, and the exact nearest of each query in them, merged as they come. What was
        filled before stays."""
        shards: dict[str, IndexShard] = {}
        truth, self.peak_mib["add"] = empty_top(len(queries.vectors)), 0.0
        for each in chain(self.attempt.filled(), self.unfilled(names, shards, learnt, queries, progress)):
            shards[each.shard.file] = each.shard
            truth = merge([truth, each.truth], K + 1, self.settings.metric)
            self.peak_mib["add"] = max(self.peak_mib["add"], each.peak_mib)
        return [shards[name] for name in names], truth

    def unfilled(
        self, names: list[str], before: dict[str, IndexShard], learnt: Learnt, queries: Queries, progress: Progress
    ) -> Iterator[Filled]:
        """Those that are not there when it is first asked for one."""
        if before:
            progress(f"{len(before)} of {len(names)} index shards were filled before")
        runs = {name: parts for name, parts in zip(names, self.plan.run_parts(), strict=True) if name not in before}
        for done, each in enumerate(self.fill(runs, learnt, queries), len(before) + 1):
            progress(f"filled {each.shard.file}, {done} of {len(names)}: {each.shard.rows:,} vectors")
            yield each

    def fill(self, runs: dict[str, Parts], learnt: Learnt, queries: Queries) -> Iterator[Filled]:
        """An index shard of each run of parts, in a task each. runs: by the file's name."""
        task: Any = fill_task.options(memory=self.plan.task_bytes)
        asked, trained = ray.put(queries.vectors), f"{self.folder}/{learnt.trained.file}"
        depth = K + 1 if self.settings.recall_queries else 0
        rest = (asked, depth, self.settings.metric, learnt.coding, self.plan.scratch_bytes)
        refs = [
            task.remote(self.store, self.attempt.note_of(name), parts, trained, f"{self.folder}/{name}", *rest)
            for name, parts in runs.items()
        ]
        try:
            yield from map(get, refs)
        except Exception:
            # None may go on to write what is then taken back.
            stop(refs)
            raise

    def variants(self, tuned: Tuned, queries: Queries, progress: Progress) -> Variants | None:
        """Other keys compared on a sample of the parts, without the queries; None where that is not asked for."""
        if self.settings.variants == "none":
            return None
        with self.stage("variants"):
            parts = self.plan.parts
            positions = pick(parts, self.settings.variant_vectors, self.settings.seed + 1)
            progress(f"comparing other keys on {sum(map(len, positions)):,} vectors")
            ids = np.concatenate([part.offset + at for part, at in zip(parts.ranges, positions, strict=True)])
            sample = np.concatenate([*self.read_at(positions)])[~np.isin(ids, queries.own)]
            found = compare(self.settings, (self.plan.key, tuned.params), sample, queries, progress)
            return found and found.model_copy(update={"version": self.version})

    def kept(self, asked: Asked) -> Asked:
        """What the next update is measured with."""
        return asked

    def grown(self, learnt: Learnt, queries: Queries, progress: Progress) -> dict[str, Any]:
        """The fields of the release that tell what it grew from."""
        return {}

    def decided(self, shards: list[IndexShard], asked: Asked, coding: Coding | None, progress: Progress) -> str | None:
        """Search parameters that no clock has a say in; None where it has."""
        if self.settings.target_recall:
            return self.reaching(self.settings.target_recall, shards, asked, coding, progress)
        return self.settings.search_params

    def reaching(
        self, target: float, shards: list[IndexShard], asked: Asked, coding: Coding | None, progress: Progress
    ) -> str:
        """The least parameters with which all index shards reach a recall@10, as search has it, of every kind of query.

        The furthest there are, and a word of it, where none does.
        """
        queries, recalls = asked.queries, dict[str, float]()
        truth = without(asked.truth, queries.own)

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

    def tune(self, shards: list[IndexShard], queries: Queries, decided: str | None) -> Tuned:
        """Parameters for all index shards, tuned on the first where none are decided, and milliseconds a query takes.

        A search goes through the index shards one after the other, so that each has its rows' share
        of the target.
        """
        shard = shards[0]
        share = shard.rows / self.plan.parts.rows
        index = open_shard(self.store, self.folder, shard)
        params = tune(index, self.plan.key, self.settings.max_query_ms * share) if decided is None else decided
        others = around(self.plan.key, params) if self.settings.recall_queries else []
        times = {}
        for each in [*others, params]:
            apply(index, each)
            times[each] = round(query_ms(index, queries.vectors, 1.0 if each == params else CURVE_S) / share, 3)
        # The parameters chosen were set last.
        return Tuned(params, times, round(batch_query_ms(index, queries.vectors, CURVE_S) / share, 3))

    def measure(self, shards: list[IndexShard], tuned: Tuned, asked: Asked, coding: Coding | None) -> dict[str, Any]:
        """The fields of the release that tell what it finds, and that its ids lead back."""
        measured = bool(self.settings.recall_queries)
        queries = asked.queries if measured else asked.queries.first(TIMED_QUERIES)
        factor = self.factor(coding)
        curve = [Ask(params, CURVE_K * factor + 1) for params in tuned.times] if measured else []
        samples = draw_samples(self.store, self.plan.parts, self.settings.seed)
        tops = self.ask(shards, [Ask(tuned.params, K * factor + 1), *curve], queries, samples, coding)
        return {
            "rerank": self.rerank(shards, queries, tops[0], coding) if coding else None,
            "round_trips": len(samples.ids),
            **(self.figures(shards, tuned, asked, tops, coding) if measured else NOT_MEASURED),
        }

    def figures(
        self, shards: list[IndexShard], tuned: Tuned, asked: Asked, tops: list[Top], coding: Coding | None
    ) -> dict[str, Any]:
        """Recall and its curve, of what all index shards found: `tops` of the tuned parameters, then of the curve's."""
        queries = asked.queries
        truth, found = without(asked.truth, queries.own), self.found(shards, queries, tops, coding)
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
        task: Any = answer_task.options(memory=self.plan.task_bytes)
        rest = (asks, ray.put(queries.vectors), samples, coding, standing(self.plan.parts))
        refs = [task.remote(self.store, self.folder, shard, *rest) for shard in shards]
        answers = (self.heard(shard, queries, get(ref)) for shard, ref in zip(shards, refs, strict=True))
        return merged(answers, asks, self.settings.metric, queries.own)

    def heard(self, shard: IndexShard, queries: Queries, answers: Answers) -> Answers:
        """Raises: IndexBuildError where the index shard does not hold what its parts do."""
        return require_whole(self.store, self.folder, shard, answers)

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
    """params: those chosen. times: milliseconds a query by parameters, these and others around them.

    batch_query_ms: a query with those chosen, of a batch that is asked at once.
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


def bytes_per_vector(shards: list[IndexShard]) -> dict[str, float]:
    rows = sum(shard.rows for shard in shards)
    sides = [shard.side.bytes for shard in shards if shard.side]
    sizes = {"index": sum(shard.bytes for shard in shards), **({"rerank": sum(sides)} if sides else {})}
    return {name: round(size / rows, 3) for name, size in sizes.items()}


def stop(refs: list[Any]) -> None:
    """Cancels tasks, and returns once none of them runs."""
    for ref in refs:
        ray.cancel(ref)
    ray.wait(refs, num_returns=len(refs))


def get(ref: Any) -> Any:
    """A task's result; our own errors as they were raised, without Ray's wrapping."""
    try:
        return ray.get(ref)
    except ray.exceptions.RayTaskError as error:
        raise (error.cause if isinstance(error.cause, VecmillError) else error) from None


def versions() -> dict[str, str]:
    named = {library: version(library) for library in ("vecmill", "autofaiss", "numpy", "pyarrow", "ray")}
    return {**named, "faiss": str(faiss.__version__)}
