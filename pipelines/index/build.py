"""The build, top-down: choose → read → train → add → tune → recall → release → publish."""

from __future__ import annotations

import hashlib
import json
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from pipelines.compact import compact_parts
from pipelines.config import IndexConfig, index_settings_of
from pipelines.contracts import Modality
from pipelines.errors import ConfigError, IndexBuildError
from pipelines.index.attempt import Attempt, Progress, attempted
from pipelines.index.id_space import fresh_id_space, kept_id_space, require_own_ids
from pipelines.index.manifest import Release, index_folder
from pipelines.index.parts import Parts, embeddings_folder, list_parts
from pipelines.index.plan import Plan, make_plan
from pipelines.index.release import finish, newest_or_none
from pipelines.index.removed import dropped
from pipelines.index.room import DiskFullError, require_room
from pipelines.index.settle import settle
from pipelines.index.stages import Build, Timed, versions
from pipelines.index.versions import unfinished
from pipelines.lease import held
from pipelines.ledger import finish as finish_begun
from pipelines.record import read_record
from pipelines.storage import Store
from pipelines.takedowns import read_takedowns


def build_index(
    store: Store,
    encoder: str,
    modality: Modality,
    settings: IndexConfig,
    progress: Progress = lambda line: None,
    force: bool = False,
    timed: Timed | None = None,
) -> Release:
    """A new release of embeddings/<encoder>/<modality>, or the current one where nothing has changed since.

    It becomes the current one unless something bars it (`obstacles`), or a later build's is that already. timed: says
    what searching it takes; where it is left out, the release does not tell.
    Needs an initialised Ray. Memory: here the training sample, in each task one index shard and one
    batch of vectors. Raises: ConfigError, IndexBuildError, NotPublishedError.
    """
    fingerprint = recorded_fingerprint(store, encoder)
    latest = newest_or_none(store, encoder, modality)

    def listed() -> Parts:
        before = [part.name for part in latest.parts.ranges] if latest and not latest.parts.gone else []
        parts = list_parts(store, embeddings_folder(encoder, modality), before)
        require_one_vector(parts, encoder, modality)
        return parts

    drop_removed(store, progress, lambda: make_plan(listed(), settings))
    takedowns, parts = read_takedowns(store), listed()
    if latest and not force and is_current(latest, parts, settings, fingerprint):
        progress(f"{latest.folder} is up to date: the same parts and settings (--force builds it again)")
        return settle(store, latest, settings, progress)
    plan = make_plan(parts, settings)
    with attempt_at(store, encoder, modality, digest_of(plan, settings, fingerprint), progress) as attempt:
        require_room(plan, attempt)
        build = Build(attempt, encoder, modality, plan, settings, dropped(store, parts, takedowns))
        return build_and_settle(build, kept_id_space(latest, parts, progress), fingerprint, progress, timed)


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
        "settings": that_decide(settings.model_dump(mode="json")),
        "fingerprint": fingerprint,
        "versions": versions(),
        "grown_from": grown_from,
    }
    return hashlib.sha256(json.dumps(decided, sort_keys=True).encode()).hexdigest()


def drop_removed(store: Store, progress: Progress, require: Callable[[], object] = lambda: None) -> None:
    """Writes the parts again that hold what was taken down; the ids of an index of the new ones start anew.

    Until that is published, nothing of their shards is found. require: raises where none can be built, in which case
    they stay as they are.
    """
    if len(read_takedowns(store).touched(waiting=True)):
        with held(store, f"remove/{uuid.uuid4().hex[:12]}", "index", say=progress):
            # Where another died at this, a shard may still have two parts, which nobody could list.
            finish_begun(store)
            require()
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


def build_and_settle(
    build: Build, id_space: int | None, fingerprint: str, progress: Progress, timed: Timed | None
) -> Release:
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
        release = build.told(build.release(id_space or 0, fingerprint, progress), timed)
    except DiskFullError:
        raise
    except (ConfigError, IndexBuildError):
        # What is wrong with its parts will still be so; whatever else ended it, the next build goes on from here.
        build.attempt.clear()
        raise
    if id_space is None:
        release = release.model_copy(update={"id_space": fresh_id_space(build.attempt, build.encoder, build.modality)})
    try:
        require_own_ids(build.store, release)
    except IndexBuildError:
        build.attempt.clear()
        raise
    finish(build.store, release, publish=False)
    build.store.delete_folder(build.attempt.staging)
    return settle(build.store, release, build.settings, progress)


def recorded_fingerprint(store: Store, encoder: str) -> str:
    """Raises: ConfigError naming the encoders that the output has."""
    known = read_record(store).encoders
    if encoder not in known:
        raise ConfigError(
            f"{store.uri()} has no encoder {encoder!r}", f"It has: {', '.join(sorted(known)) or 'none; embed first'}."
        )
    return known[encoder].fingerprint


def is_current(latest: Release, parts: Parts, settings: IndexConfig, fingerprint: str) -> bool:
    made_by = (latest.parts, that_decide(with_defaults(latest.settings)), latest.fingerprint)
    same = made_by == (parts, that_decide(settings.model_dump(mode="json")), fingerprint)
    return same and (settings.variants == "none" or latest.settings.get("variants") == settings.variants)


def with_defaults(settings: dict[str, Any]) -> dict[str, Any]:
    """Those of today, of a release that was made before some of them were known."""
    return {**IndexConfig().model_dump(mode="json"), **index_settings_of(settings)}


def that_decide(settings: dict[str, Any]) -> dict[str, Any]:
    """Without those that decide what becomes of a release, or what else is told of it."""
    told = ("floor", "keep", "variants", "variant_vectors")
    return {name: value for name, value in settings.items() if name not in told}
