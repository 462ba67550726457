"""The embed run: read → decode → encode → write, as four Ray Data operators."""

from __future__ import annotations

import json
import time
import uuid
from contextlib import AbstractContextManager, ExitStack
from dataclasses import replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import ray
from ray.data import ActorPoolStrategy, DataContext

from pipelines.config import RunConfig
from pipelines.decode import Decode
from pipelines.encode import Encode
from pipelines.encoders.base import Target
from pipelines.errors import LedgerError
from pipelines.failures import plain_errors
from pipelines.lease import Say, held
from pipelines.ledger import Work, conclude, make_plan, retire, settle, tally
from pipelines.meter import OnProgress, RemoteObserve, reading, reporting, start_meter
from pipelines.observe import Observe, Pace, Stages, bottleneck
from pipelines.prepare import Prepared, all_actors, require_output
from pipelines.read import ShardSource
from pipelines.record import write_record
from pipelines.storage import Store
from pipelines.takedowns import Touched, read_takedowns
from pipelines.translate import Translate
from pipelines.write import EmbeddingSink

if TYPE_CHECKING:
    from pipelines.encoders.marian import TranslationSpec

Report = dict[str, Any]


def pipeline(run: Prepared, observe: Observe) -> Any:
    """A Ray data set of encoded rows: the operators that make vectors (encode once a pool); the sink writes them.

    Decode and encode ask for different resources, else Ray would fuse decoding into the encode actor.
    """
    config = run.config
    source = ShardSource(
        run.plan.pending, config.read, Store(options=config.storage), observe, run.store, superseded(run)
    )
    rows = ray.data.read_datasource(source, override_num_blocks=len(run.plan.pending))
    if run.translation and run.pending:
        rows = translated(rows, config, run.translation, observe)
    rows = rows.map_batches(
        Decode(run.pending, config.decode, observe),
        batch_format="pyarrow",
        batch_size=None,
        memory=config.cluster.memory_per_decode_task_mib * 2**20,
    )
    for pool in run.pools:
        rows = encoded(rows, pool, run, observe)
    return rows


def superseded(run: Prepared) -> dict[str, Touched]:
    """What `Takedowns.superseded` says of the run's input."""
    return read_takedowns(run.store).superseded(run.plan.shards)


def encoded(rows: Any, pool: tuple[Target, ...], run: Prepared, observe: Observe) -> Any:
    encode = run.config.encode
    return rows.map_batches(
        Encode,
        fn_constructor_args=(pool, encode, run.device, observe, len(run.pools) > 1),
        compute=ActorPoolStrategy(
            size=int(encode.actors), max_concurrent_calls_per_actor=2, enable_true_multi_threading=True
        ),
        batch_format="pyarrow",
        batch_size=max(target.batch_size for target in pool) * BATCHES_PER_CALL,
        num_cpus=encode.cpus_per_actor,
        **({"num_gpus": encode.gpus_per_actor} if encode.gpus_per_actor else {}),
    )


def translated(rows: Any, config: RunConfig, translation: TranslationSpec, observe: Observe) -> Any:
    settings = config.translate
    return rows.map_batches(
        Translate,
        fn_constructor_args=(translation, settings.batch_size, "cuda" if settings.gpus_per_actor else "cpu", observe),
        compute=ActorPoolStrategy(size=settings.actors),
        batch_format="pyarrow",
        batch_size=None,
        num_cpus=1,
        memory=settings.memory_mib * 2**20,
        **({"num_gpus": settings.gpus_per_actor} if settings.gpus_per_actor else {}),
    )


BATCHES_PER_CALL = 4
"""Micro-batches in one call of an actor, so that the copy of the next overlaps the compute of this one."""


def embed(
    run: Prepared,
    on_progress: OnProgress = lambda stages: None,
    progress_interval_s: float = 1.0,
    prune: bool = False,
    say: Say = lambda line: None,
) -> Report:
    """Embeds what is pending and returns the run's report, which is also put under `reports/`.

    Ray must be connected. prune: removes what was made of shards that have vanished from the input. say: told what
    the run waits for. Raises: VecmillError; whatever is committed by then stays.
    """
    started = time.monotonic()
    require_output(run.store)
    with ExitStack() as leases:
        for folder in sorted(run.folders):
            leases.enter_context(held(run.store, f"embed/{folder}", "embed", say=say))
        # Another run may have ended since this one was planned.
        others = run.record.encoders.keys() - set(run.folders)
        run = replace(run, plan=make_plan(run.store, run.plan.shards, run.families, others))
        write_record(run.store, run.record)
        settle(run.store, run.plan)
        meter, pace = start_meter(), Pace()

        def watch(stages: Stages) -> None:
            pace.add(time.monotonic() - started, stages)
            on_progress(stages)

        if run.plan.pending:
            with reporting(meter, watch, progress_interval_s), failing_plainly(run):
                write_pending(run, RemoteObserve(meter))
            finish(run)
        if prune:
            for ref in run.plan.vanished:
                retire(run.store, ref)
        report = {**make_report(run, reading(meter), time.monotonic() - started), "pace": pace.points}
        run.store.put_atomic(f"reports/{report['run']}.json", json.dumps(report, indent=2).encode())
    return report


def failing_plainly(run: Prepared) -> AbstractContextManager[None]:
    def pending() -> list[Work]:
        return make_plan(run.store, run.plan.shards, run.families).pending

    return plain_errors(pending, run.config.cluster.no_progress_timeout_s)


def write_pending(run: Prepared, observe: Observe) -> None:
    configure(run)
    sink = EmbeddingSink(run.store, run.families, run.config.write, run.plan, observe, superseded(run))
    pipeline(run, observe).write_datasink(sink, ray_remote_args={"num_cpus": 1})


def finish(run: Prepared) -> None:
    """Every shard must be committed and placed now. Raises: LedgerError naming those that are not."""
    pending = conclude(run.store, run.plan, run.families)
    if pending:
        names = ", ".join(work.shard.uri for work in pending[:3])
        raise LedgerError(
            f"{len(pending)} shards are not complete although the run has ended: {names}",
            "Run the same command again; if it says so again, please report it.",
        )


def configure(run: Prepared) -> None:
    """Ray Data's settings, made before the data set is: they are sealed into it."""
    context = DataContext.get_current()
    context.max_errored_blocks = 0
    context.enable_progress_bars = False
    context.execution_options.preserve_order = False
    context.execution_options.verbose_progress = False
    context.actor_init_retry_on_errors = True
    context.max_consecutive_actor_init_deaths = 2
    context.execution_no_progress_timeout_s = run.config.cluster.no_progress_timeout_s


def make_report(run: Prepared, stages: Stages, seconds: float) -> Report:
    """Items over the whole ledger of the run's encoders; stages of this run alone."""
    encoders = {target.folder: _encoder_report(run, target) for target in run.targets}
    encode = run.config.encode
    actors = all_actors(run.config)
    spare_cpus = run.cpus - actors * encode.cpus_per_actor
    workers = {"encode": float(actors), **dict.fromkeys(("read", "decode", "write"), max(1.0, spare_cpus))}
    return {
        "run": f"{datetime.now(UTC):%Y%m%dT%H%M%SZ}-{uuid.uuid4().hex[:8]}",
        "seconds": round(seconds, 3),
        "shards": {
            "input": len(run.plan.shards),
            "done_before": run.plan.done,
            "done_now": len(run.plan.pending),
            "changed": len(run.plan.changed),
            "vanished": len(run.plan.vanished),
        },
        "encoders": encoders,
        "reject_rate": max(encoder["reject_rate"] for encoder in encoders.values()),
        "reject_ceiling": run.config.write.reject_ceiling,
        "stages": {name: _stage(numbers) for name, numbers in stages.items()},
        "bottleneck": bottleneck(stages, workers),
        "settings": run.record.settings,
    }


def _encoder_report(run: Prepared, target: Target) -> Report:
    counts, reasons, shards = tally(run.store, [target.folder])
    items = sum(count.items for count in counts.values())
    rejected = sum(count.rejected for count in counts.values())
    return {
        "name": target.spec.name,
        "fingerprint": target.spec.fingerprint,
        "committed": shards,
        "items": {modality: count.model_dump() for modality, count in counts.items()},
        "rejects": dict(sorted(reasons.items(), key=lambda item: -item[1])),
        "reject_rate": rejected / items if items else 0.0,
        "versions": run.record.encoders[target.folder].versions,
    }


def _stage(numbers: dict[str, float]) -> dict[str, float]:
    seconds = numbers.get("seconds", 0.0)
    rate = {"rows_per_second": numbers["rows"] / seconds} if seconds and "rows" in numbers else {}
    return {name: round(value, 3) for name, value in {**numbers, **rate}.items()}
