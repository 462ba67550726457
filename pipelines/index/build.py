"""The build, top-down: choose → read → train → add → tune → recall → release."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import faiss
import ray

from pipelines.config import IndexConfig
from pipelines.contracts import Modality
from pipelines.errors import ConfigError, IndexBuildError, VecmillError
from pipelines.index.add import fill_task, probe_task, read_task
from pipelines.index.parts import Parts, Vectors, embeddings_folder, list_parts
from pipelines.index.plan import Plan, make_plan
from pipelines.index.queries import Queries, caption_queries, split_sample
from pipelines.index.recall import DEPTHS, Top, merge, recall_of, without
from pipelines.index.release import (
    IndexShard,
    Recall,
    Release,
    claim_version,
    finish,
    index_folder,
    latest_or_none,
    open_shard,
    unfinished,
)
from pipelines.index.train import train
from pipelines.index.tune import apply, query_ms, tune
from pipelines.lease import held
from pipelines.observe import Clock, peak_memory_mib
from pipelines.record import read_record
from pipelines.storage import Store, scratch_folder

Progress = Callable[[str], None]
K = max(DEPTHS)


def build_index(
    store: Store,
    encoder: str,
    modality: Modality,
    settings: IndexConfig,
    progress: Progress = lambda line: None,
    force: bool = False,
) -> Release:
    """A new release of embeddings/<encoder>/<modality>, or the current one where nothing has changed since.

    Needs an initialised Ray. Memory: here the training sample, in each task one index shard and one
    batch of vectors. Raises: ConfigError, IndexBuildError.
    """
    fingerprint = recorded_fingerprint(store, encoder)
    latest = latest_or_none(store, encoder, modality)
    before = [part.name for part in latest.parts.ranges] if latest else []
    parts = list_parts(store, embeddings_folder(encoder, modality), before)
    if latest and not force and is_current(latest, parts, settings, fingerprint):
        progress(f"{latest.folder} is up to date: the same parts and settings (--force builds it again)")
        return latest
    require_one_vector(parts, encoder, modality)
    plan = make_plan(parts, settings)
    require_room(plan)
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
    finish(build.store, release)
    progress(f"{release.folder} is the current release")
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
    made_by = (latest.parts, latest.settings, latest.fingerprint)
    return made_by == (parts, settings.model_dump(mode="json"), fingerprint)


def require_room(plan: Plan) -> None:
    """Raises: IndexBuildError where no node of the cluster has the memory for a task, which would wait for ever."""
    nodes: list[dict[str, Any]] = ray.nodes()  # type: ignore[no-untyped-call]
    room = max((node["Resources"].get("memory", 0) for node in nodes if node["Alive"]), default=0)
    if plan.task_bytes > room:
        raise IndexBuildError(
            f"Filling an index shard needs {plan.task_bytes:,} bytes; the cluster's largest node gives {room:,.0f}",
            "Raise index.shards, choose a smaller index.index_key, or add memory.",
        )


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
        del sample
        with self.stage("add"):
            shards, truth = self.add(trained, queries, progress)
        with self.stage("tune"):
            params, query_ms = self.tune(shards[0], queries)
        with self.stage("recall"):
            measured = self.recall(shards, params, queries, truth)
        return Release(
            version=self.version,
            id_space=id_space,
            encoder=self.encoder,
            modality=self.modality,
            fingerprint=fingerprint,
            metric=self.settings.metric,
            index_key=self.plan.key,
            search_params=params,
            query_ms=query_ms,
            parts=self.plan.parts,
            shards=tuple(shards),
            recall=measured,
            settings=self.settings.model_dump(mode="json"),
            seed=self.settings.seed,
            seconds=self.seconds,
            peak_mib=self.peak_mib,
            versions=versions(),
        )

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

    def add(self, trained: str, queries: Queries, progress: Progress) -> tuple[list[IndexShard], Top]:
        task = fill_task.options(memory=self.plan.task_bytes)
        asked = ray.put(queries.vectors)
        refs = [
            task.remote(
                self.store, parts, trained, f"{self.folder}/shard-{at:04d}.faiss", asked, K + 1, self.settings.metric
            )
            for at, parts in enumerate(self.plan.run_parts())
        ]
        filled = []
        for ref in refs:
            filled.append(get(ref))
            progress(f"filled {filled[-1].shard.file}, {len(filled)} of {len(refs)}: {filled[-1].shard.rows:,} vectors")
        self.peak_mib["add"] = max(each.peak_mib for each in filled)
        return [each.shard for each in filled], merge([each.truth for each in filled], K + 1, self.settings.metric)

    def tune(self, shard: IndexShard, queries: Queries) -> tuple[str, float]:
        """Parameters for all index shards, tuned on the first, and milliseconds a query of all takes.

        A search goes through the index shards one after the other, so that each has its rows' share
        of the target.
        """
        share = shard.rows / self.plan.parts.rows
        index = open_shard(self.store, self.folder, shard)
        params = tune(index, self.plan.key, self.settings.max_query_ms * share)
        apply(index, params)
        return params, round(query_ms(index, queries.vectors) / share, 3)

    def recall(self, shards: list[IndexShard], params: str, queries: Queries, truth: Top) -> Recall:
        asked = ray.put(queries.vectors)
        task = probe_task.options(memory=self.plan.task_bytes)
        refs = [task.remote(self.store, self.folder, shard, params, asked, K + 1) for shard in shards]
        found = merge(map(get, refs), K + 1, self.settings.metric)
        found, truth = without(found, queries.own), without(truth, queries.own)
        figures = {kind: recall_of(found.of(rows), truth.of(rows)) for kind, rows in queries.slices().items()}
        return Recall(queries={kind: len(asked) for kind, asked in queries.kinds.items()}, figures=figures)


def get(ref: Any) -> Any:
    """A task's result; our own errors as they were raised, without Ray's wrapping."""
    try:
        return ray.get(ref)
    except ray.exceptions.RayTaskError as error:
        raise (error.cause if isinstance(error.cause, VecmillError) else error) from None


def versions() -> dict[str, str]:
    named = {library: version(library) for library in ("vecmill", "autofaiss", "numpy", "pyarrow", "ray")}
    return {**named, "faiss": str(faiss.__version__)}
