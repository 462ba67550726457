"""The stages of a build: read → train → add → tune → recall, each timed, up to a release without its manifest."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import version
from itertools import chain
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import ray

from pipelines.config import IndexConfig
from pipelines.contracts import Modality
from pipelines.index.add import fill_task, read_task, results
from pipelines.index.asked import Asked, keep_asked
from pipelines.index.attempt import Attempt, Filled, Learnt, Progress
from pipelines.index.chart import svg
from pipelines.index.files import sha256_of
from pipelines.index.gpu import trained
from pipelines.index.manifest import CHART, REPORT, TRAINED, Coding, IndexShard, KeptFile, Latency, Release, Variants
from pipelines.index.measure import Answers, require_whole
from pipelines.index.measuring import K, Measuring, Tuned
from pipelines.index.parts import Ids, Parts, Vectors, pick
from pipelines.index.plan import Plan
from pipelines.index.queries import Queries, queries_across, split_sample
from pipelines.index.recall import Top, empty_top, merge
from pipelines.index.report import markdown
from pipelines.index.rerank import learn_coding
from pipelines.index.variants import compare
from pipelines.observe import Clock, peak_memory_mib
from pipelines.storage import Store, scratch_folder

Timed = Callable[[Store, Release], dict[str, Latency]]
"""What searching a release takes, by what is asked for."""


class Build:
    """One attempt at a release: its place, its plan, and what its stages took. dropped: as of the release."""

    def __init__(
        self,
        attempt: Attempt,
        encoder: str,
        modality: Modality,
        plan: Plan,
        settings: IndexConfig,
        dropped: tuple[str, ...] = (),
    ) -> None:
        self.attempt, self.encoder, self.modality, self.dropped = attempt, encoder, modality, dropped
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
        """All files are in place but those that tell of them."""
        learnt, queries = self.learnt(progress)
        coding = learnt.coding
        with self.stage("add"):
            shards, asked = self.add(learnt, queries, progress)
        with self.stage("tune"):
            measuring = self.measuring(shards, coding)
            tuned = measuring.tune(queries, self.decided(measuring, asked, progress))
        with self.stage("recall"):
            measured = measuring.measure(tuned, asked)
        variants = self.variants(tuned, queries, progress)
        return Release(
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
            dropped=self.dropped,
            asked=keep_asked(self.store, self.folder, self.kept(asked)),
            variants=variants,
            **self.grown(learnt, queries, progress),
            **measured,
        )

    def told(self, release: Release, timed: Timed | None) -> Release:
        """With what searching it takes, and its report and chart written."""
        if timed:
            with self.stage("search"):
                latency = timed(self.store, release)
            costs = {"seconds": self.seconds, "peak_mib": self.peak_mib}
            release = release.model_copy(update={"latency": latency, **costs})
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
            index = self.train(sample, progress)
            coding = learn_coding(self.plan.rerank, sample if len(sample) else queries.kinds[self.modality])
        learnt = Learnt(trained=index, coding=coding, seconds=self.seconds, peak_mib=self.peak_mib)
        self.attempt.keep_learnt(learnt, queries)
        return learnt, queries

    def read(self, progress: Progress) -> tuple[Vectors, Queries]:
        """The training sample, float32 [n, dim], and the queries; each part's share read in its run's task."""
        drawn = self.plan.draw
        progress(f"reading {len(drawn.train):,} vectors to train on and {len(drawn.queries):,} to ask for")
        sample, own = split_sample(self.read_at(drawn.positions), drawn, self.plan.parts.dim)
        across = queries_across(self.store, self.encoder, self.modality, self.plan.new_parts, self.settings)
        return sample, Queries({self.modality: own, **across}, drawn.ids(self.plan.parts)[drawn.queries])

    def read_at(self, positions: Sequence[Ids]) -> Iterator[Vectors]:
        """float32 [n, dim] of each run of parts, whose sorted positions of each part are given."""
        runs = zip(self.plan.run_parts(), self.plan.runs, strict=True)
        return results(
            partial(read_task.remote, self.store, parts, positions[run.start : run.stop]) for parts, run in runs
        )

    def train(self, sample: Vectors, progress: Progress) -> KeptFile:
        """The empty trained index that every index shard starts from."""
        index, peak_mib = trained(self.plan.key, self.settings.metric, sample, self.plan.parts.dim, progress)
        self.peak_mib["train"] = round(peak_mib, 1)
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
        # Where one fails, none may go on to write what is then taken back.
        return results(
            partial(task.remote, self.store, self.attempt.note_of(name), parts, trained, f"{self.folder}/{name}", *rest)
            for name, parts in runs.items()
        )

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

    def decided(self, measuring: Measuring, asked: Asked, progress: Progress) -> str | None:
        """Search parameters that no clock has a say in; None where it has."""
        if self.settings.target_recall:
            return measuring.reaching(self.settings.target_recall, asked, progress)
        return self.settings.search_params

    def measuring(self, shards: list[IndexShard], coding: Coding | None) -> Measuring:
        return Measuring(self.store, self.folder, shards, self.plan, self.settings, coding, self.heard)

    def heard(self, shard: IndexShard, answers: Answers) -> Answers:
        """Raises: IndexBuildError where the index shard does not hold what its parts do."""
        return require_whole(self.store, self.folder, shard, answers)


def bytes_per_vector(shards: list[IndexShard]) -> dict[str, float]:
    rows = sum(shard.rows for shard in shards)
    sides = [shard.side.bytes for shard in shards if shard.side]
    sizes = {"index": sum(shard.bytes for shard in shards), **({"rerank": sum(sides)} if sides else {})}
    return {name: round(size / rows, 3) for name, size in sizes.items()}


def versions() -> dict[str, str]:
    named = {library: version(library) for library in ("vecmill", "autofaiss", "numpy", "pyarrow", "ray")}
    return {**named, "faiss": str(faiss.__version__)}
