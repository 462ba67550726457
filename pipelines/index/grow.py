"""An update: the current release's index shards as they are, and new ones, or the last anew, for what came since."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import numpy as np

from pipelines.config import IndexConfig, index_settings_of, validate
from pipelines.contracts import Modality
from pipelines.errors import ConfigError, IndexBuildError
from pipelines.index.asked import Asked, read_asked
from pipelines.index.attempt import Attempt, Learnt, Progress
from pipelines.index.build import (
    attempt_at,
    build_and_settle,
    digest_of,
    drop_removed,
    recorded_fingerprint,
    that_decide,
    with_defaults,
)
from pipelines.index.choose import cut, shard_count
from pipelines.index.current import publication
from pipelines.index.drift import drift, warning
from pipelines.index.files import load_index
from pipelines.index.manifest import NEW, IndexShard, Release, Variants, index_folder
from pipelines.index.measure import Answers
from pipelines.index.measuring import K
from pipelines.index.parts import Parts, list_grown, pick
from pipelines.index.plan import Plan
from pipelines.index.publish import require_files
from pipelines.index.queries import Queries
from pipelines.index.recall import Top
from pipelines.index.release import latest_or_none, newest_or_none, releases
from pipelines.index.removed import holds_removed
from pipelines.index.rerank import rerank_dtype
from pipelines.index.room import require_room
from pipelines.index.settle import settle
from pipelines.index.stages import Build, Timed
from pipelines.index.train import HELD_OUT, Draw
from pipelines.storage import Store

COPIES = 8


def update_index(
    store: Store,
    encoder: str,
    modality: Modality,
    given: Mapping[str, Any],
    progress: Progress = lambda line: None,
    timed: Timed | None = None,
) -> Release:
    """The current release with the parts that it lacks, in new index shards of the same quantiser, or in its last where
    that is small; the same release where it lacks none. Every id stays; those of parts that are gone are never found
    again. A newer release that was rolled back, or barred, is passed over.

    given: index settings in place of the release's own. timed: as for a build. Reads the vectors of those parts only
    that it fills an index shard with. Raises: ConfigError for settings that only a new build can have,
    IndexBuildError where there is nothing to add to, NotPublishedError.
    """
    base = latest_or_none(store, encoder, modality) or newest_or_none(store, encoder, modality)
    if base is None:
        raise IndexBuildError(
            f"There is no index of {store.uri()}, {encoder}, {modality} to add to", "Run `vecmill index` first."
        )
    require_nothing_removed(store, base)
    settings, fingerprint = settings_of(store, base, given), recorded_fingerprint(store, encoder)
    require_same(base, settings, fingerprint)
    drop_removed(store, progress)
    others = list(releases(store, encoder, modality))
    for each in (base, *(other for other in others if is_the_same(other, base, settings))):
        if list_grown(store, each.parts) == each.parts:
            progress(f"{each.folder} has all parts there are: nothing to add")
            return settle(store, each, settings, progress)
    parts, id_space = ids_of(store, base, others, list_grown(store, base.parts))
    asked = require_base(store, base, parts)
    plan = plan_update(base, parts, settings)
    digest = digest_of(plan, settings, fingerprint, base.version)
    with attempt_at(store, encoder, modality, digest, progress) as attempt:
        require_room(plan, attempt)
        return build_and_settle(Update(attempt, base, asked, plan, settings), id_space, fingerprint, progress, timed)


def is_the_same(other: Release, base: Release, settings: IndexConfig) -> bool:
    """Whether it is an update of the base as this one will be, if there are the same parts: one that was turned down is
    not built again."""
    asked = that_decide(settings.model_dump(mode="json"))
    return other.grown_from == base.version and that_decide(with_defaults(other.settings)) == asked


def ids_of(store: Store, base: Release, others: Iterable[Release], grown: Parts) -> tuple[Parts, int | None]:
    """The parts that are there now with their ids, and the id space that these are of, None for one of their own.

    grown: those of the base, and what follows. Releases that are passed over have given ids to parts as well: they keep
    them, and where they cannot, since some have gone again, the ids are of no space that there was.
    """
    given = [other.parts for other in others if other.id_space == base.id_space]
    most = max([base.parts, *given], key=lambda parts: len(parts.ranges))
    known = len(base.parts.ranges)
    if len(most.ranges) == known:
        return grown, base.id_space
    kept = list_grown(store, most)
    return (kept, base.id_space) if not any(part.gone for part in kept.ranges[known:]) else (grown, None)


def settings_of(store: Store, base: Release, given: Mapping[str, Any]) -> IndexConfig:
    """The release's own, with the floor that it was accepted with, but for those given; how many index shards is asked
    anew each time."""
    known = publication(store, index_folder(base.encoder, base.modality), base.version)
    accepted = {"floor": known.floor} if known and known.floor is not None else {}
    return validate(IndexConfig, {**index_settings_of(base.settings), **accepted, "shards": "auto", **given})


def require_same(base: Release, settings: IndexConfig, fingerprint: str) -> None:
    """Raises: ConfigError for what an index cannot change while it grows."""
    has = base.rerank.coding.dtype if base.rerank else "none"
    queries = base.settings["recall_queries"], settings.recall_queries
    pinned = base.search_params if settings.search_params is None else settings.search_params
    wanted: dict[str, tuple[Any, Any]] = {
        "fingerprint": (base.fingerprint, fingerprint),
        "metric": (base.metric, settings.metric),
        "index_key": (base.index_key, settings.index_key or base.index_key),
        "rerank": (has, rerank_dtype(base.index_key, settings)),
        "search_params": (base.search_params, pinned),
        "target_recall": (base.settings.get("target_recall"), settings.target_recall),
        "max_query_ms": (base.settings.get("max_query_ms", settings.max_query_ms), settings.max_query_ms),
        "variants": (base.settings.get("variants", "none"), settings.variants),
        # Of queries that the base was not asked, the nearest in it are not known.
        **({} if all(queries) else {"recall_queries": queries}),
    }
    if differing := [f"{name} {old} → {new}" for name, (old, new) in wanted.items() if old != new]:
        raise ConfigError(
            f"{base.folder} cannot be updated with another {'; '.join(differing)}",
            "Leave that out, or build anew: `vecmill index` without --update.",
        )


def require_nothing_removed(store: Store, base: Release) -> None:
    """Raises: ConfigError where the files that an update takes over have vectors of what was taken down."""
    if holds_removed(store, base):
        raise ConfigError(
            f"{base.folder} has vectors of what was taken down since, and an update would keep them",
            "Build anew, which drops them: `vecmill index` without --update.",
        )


def require_base(store: Store, base: Release, parts: Parts) -> Asked:
    """What is left of the queries that the release was measured with.

    Raises: IndexBuildError where files of it are missing, or nothing in it stands.
    """
    require_files(store, base)
    asked = read_asked(store, base).standing(parts)
    if not parts.run(0, len(base.parts.ranges)).standing or not len(asked.bounds):
        raise IndexBuildError(
            f"The parts of {base.folder} are gone or replaced: there is nothing to add to",
            "Run `vecmill index` without --update, which builds anew.",
        )
    return asked


def plan_update(base: Release, parts: Parts, settings: IndexConfig) -> Plan:
    known = len(base.parts.ranges)
    new = parts.run(known, len(parts.ranges))
    counted = settings.model_copy(update={"index_key": base.index_key})
    first = first_refilled(base, parts, counted)
    fresh = [range(run.start + known, run.stop + known) for run in cut(new, shard_count(new, counted))]
    runs = fresh if first == known else [range(first, len(parts.ranges))]
    positions = [np.empty(0, np.int64)] * known + pick(new, settings.recall_queries or HELD_OUT, settings.seed)
    queries = np.arange(sum(map(len, positions)))
    drawn = Draw(tuple(positions), train=queries[:0], queries=queries)
    largest = max(shard.bytes for shard in base.shards)
    return Plan(parts, base.index_key, tuple(runs), drawn, rerank_dtype(base.index_key, settings), known, largest)


def first_refilled(base: Release, parts: Parts, settings: IndexConfig) -> int:
    """Where the new parts' index shard begins: at the first of them, or at the first part of the base's last index
    shard, which is filled anew with them where that makes it no larger than the largest.

    So many small updates leave few index shards. Not where it is said how many there shall be.
    """
    known, last = len(base.parts.ranges), base.shards[-1]
    first = next(at for at, part in enumerate(parts.ranges) if part.offset >= last.first_id and part.rows)
    run = parts.run(first, len(parts.ranges))
    fits = last.rows < run.rows <= max(shard.rows for shard in base.shards)
    whole = not any(part.gone for part in run.ranges)
    return first if settings.shards == "auto" and fits and whole and shard_count(run, settings) == 1 else known


class Update(Build):
    """Queries: those that the base was measured with, whose nearest in it are known, and new ones, drawn from the new
    parts, which are asked of the index shards that are filled only. So no vector of the others is read."""

    def __init__(self, attempt: Attempt, base: Release, asked: Asked, plan: Plan, settings: IndexConfig) -> None:
        super().__init__(attempt, base.encoder, base.modality, plan, settings, base.dropped)  # type: ignore[arg-type]
        self.base, self.asked = base, asked
        refilled = any(run.start < plan.standing for run in plan.runs)
        self.kept_shards = base.shards[:-1] if refilled else base.shards

    def learnt(self, progress: Progress) -> tuple[Learnt, Queries]:
        if known := self.attempt.learnt():
            self.seconds, self.peak_mib = known[0].seconds, known[0].peak_mib
            return known
        with self.stage("copy"):
            self.copy(progress)
        with self.stage("read"):
            queries = self.queries(progress)
        assert self.base.trained is not None
        coding = self.base.rerank.coding if self.base.rerank else None
        learnt = Learnt(trained=self.base.trained, coding=coding, seconds=self.seconds, peak_mib=self.peak_mib)
        self.attempt.keep_learnt(learnt, queries)
        return learnt, queries

    def copy(self, progress: Progress) -> None:
        """The base's files: it may be deleted one day, and a release stands for itself."""
        there = dict(self.store.sizes(self.folder))
        kept = self.base.model_copy(update={"shards": self.kept_shards, "asked": None})
        missing = [file.file for file in kept.files if there.get(f"{self.folder}/{file.file}") != file.bytes]
        progress(f"taking over {len(self.kept_shards)} index shards of {self.base.version}")
        if len(self.kept_shards) < len(self.base.shards):
            progress(f"filling {self.base.shards[-1].file} anew, which has room for the new parts")
        with ThreadPoolExecutor(COPIES) as pool:
            list(pool.map(self.take, missing))

    def take(self, file: str) -> None:
        try:
            self.store.copy(f"{self.base.folder}/{file}", f"{self.folder}/{file}")
        except FileNotFoundError:
            raise IndexBuildError(
                f"{self.store.uri(self.base.folder)}/{file} is gone: another build has deleted the release meanwhile",
                "Run the same command again.",
            ) from None

    def queries(self, progress: Progress) -> Queries:
        """The base's, and those of the new parts as kinds of their own: `new image`."""
        if not self.plan.new_parts.rows:
            return self.asked.queries
        _, found = self.read(progress)
        newer = {f"{NEW}{kind}": vectors for kind, vectors in found.kinds.items()}
        return self.asked.queries.followed_by(Queries(newer, found.ids))

    def add(self, learnt: Learnt, queries: Queries, progress: Progress) -> tuple[list[IndexShard], Asked]:
        first = len(self.kept_shards)
        names = [f"shard-{at:04d}.faiss" for at in range(first, first + len(self.plan.runs))]
        shards, newer = self.filled(names, learnt, queries, progress)
        return [*self.kept_shards, *shards], self.asked.leading(queries).with_newer(self.unknown(newer), K + 1)

    def unknown(self, newer: Top) -> Top:
        """Without what is known already: of the base's queries, the nearest in the base."""
        known = newer.ids < self.base.parts.rows
        known[len(self.asked.bounds) :] = False
        return Top(np.where(known, -1, newer.ids), newer.scores)

    def decided(self, *_: Any) -> str:
        return self.base.search_params

    def heard(self, shard: IndexShard, answers: Answers) -> Answers:
        """Of new queries, only what filled index shards say: of the others' vectors it is not known which are near."""
        answers = super().heard(shard, answers)
        if shard not in self.kept_shards:
            return answers
        return replace(answers, tops=[self.of_old(top) for top in answers.tops])

    def of_old(self, top: Top) -> Top:
        ids = top.ids.copy()
        ids[len(self.asked.bounds) :] = -1
        return Top(ids, top.scores)

    def variants(self, *_: Any) -> Variants | None:
        """The base's: of old vectors it reads none."""
        return self.base.variants

    def kept(self, asked: Asked) -> Asked:
        return asked.first(len(self.asked.bounds))

    def grown(self, learnt: Learnt, queries: Queries, progress: Progress) -> dict[str, Any]:
        found = None
        old, new = (queries.kinds.get(kind) for kind in (self.modality, f"{NEW}{self.modality}"))
        if old is not None and new is not None:
            trained, _ = load_index(self.store, f"{self.folder}/{learnt.trained.file}")
            found = drift(trained, old, new)
        if told := warning(found, self.settings.drift_warning):
            progress(told)
        return {"grown_from": self.base.version, "drift": found}
