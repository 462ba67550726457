"""A training run: its plan, and Ray Train at work on it. What it makes is in `Store(config.output)`:

train.json         settings, and the versions of the input's shards
survey.json        the training samples' numbers, words and identities
checkpoints/       the last two, from which the same command goes on
model/             config.json, model.safetensors, vocab.txt: the best epoch's, an encoder at once
metrics.json       every epoch's figures       curves.png   the same to look at
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from typing import Any

import pyarrow as pa
import ray
import ray.data
import ray.train
import ray.train.torch
import torch
from ray.data import DataContext, ExecutionOptions
from ray.train import DataConfig as SplitBetweenWorkers
from ray.train import FailureConfig, RunConfig, ScalingConfig
from torch import nn

from pipelines import sources
from pipelines.contracts import Shard
from pipelines.encoders.matcher import image_transform
from pipelines.encoders.matcher_model import Matcher, image_tower
from pipelines.errors import ConfigError, InputError, PreflightError
from pipelines.failures import plain_errors
from pipelines.lease import Say, held
from pipelines.ledger import Work
from pipelines.meter import OnProgress, RemoteObserve, reading, reporting, start_meter
from pipelines.observe import Observe, nowhere
from pipelines.prepare import Beside, Cluster, require_decode_memory, require_output
from pipelines.read import ShardSource
from pipelines.record import differences
from pipelines.secrets import masked_values
from pipelines.storage import Store, scratch_folder
from pipelines.training.checkpoint import RECORD, SURVEY, Position, checkpoints, read_history
from pipelines.training.examples import Examples, Part
from pipelines.training.loop import Task, Worker, matcher_config
from pipelines.training.place import Place
from pipelines.training.settings import ModelConfig, TrainConfig
from pipelines.training.survey import SIGNS, Count, Survey, add_up
from pipelines.training.trainer import Trainer

_MAY_CHANGE = {"output", "checkpoint", "workers", "cluster", "storage"}
"""Settings that a run may be continued with others of; the rest decides what it makes."""


@dataclass(frozen=True)
class TrainRun:
    """A run ready to start. config holds no "auto". shards: of the input; val_shards: of what is evaluated on.

    done: what the last checkpoint has. finished: nothing is left to do.
    """

    config: TrainConfig
    store: Store
    shards: list[Shard]
    val_shards: list[Shard]
    record: dict[str, Any]
    done: Position
    finished: bool

    @property
    def train_part(self) -> Part:
        data = self.config.data
        return Part(
            data.identity,
            tuple(data.train) if data.train else None,
            ("train", data.split) if data.split else None,
            data.together,
        )

    @property
    def val_part(self) -> Part:
        data = self.config.data
        return Part(data.identity, (data.val,) if data.val else None, ("val", data.split) if data.split else None)


def prepare_training(config: TrainConfig, cluster: Cluster) -> TrainRun:
    """Reads, and changes nothing. Raises: ConfigError, InputError, PreflightError, EncoderError."""
    store, data = Store(config.output, config.storage), config.data
    before = _recorded(store)
    config = resolved(_as_recorded(config, before), cluster)
    done = max(checkpoints(store), default=(0, 0))
    if not any(done):
        require_tower(config.model)
    shards = _shards(config.input, config)
    others = data.val_input or ([] if not config.evaluates else config.input)
    val_shards = shards if others == config.input else _shards(others, config) if others else []
    settings = masked_values(config.model_dump(mode="json", exclude=_MAY_CHANGE))
    versions = {shard.id: shard.version for shard in {*shards, *val_shards}}
    record = {"settings": settings, "shards": versions}
    if before is not None:
        _require_same(store, before, record)
    finished = bool(read_history(store).get("finished"))
    return TrainRun(config, store, shards, val_shards, record, done, finished)


def require_tower(model: ModelConfig) -> None:
    """The image tower is built here first, without memory for its weights, or with those that a file has.

    Raises: ConfigError where there is no such file, or none of its weights is the tower's; EncoderError for what timm
    cannot build or gives no one vector.
    """
    file = model.weights_file
    if file and not Path(file).is_file():
        raise ConfigError(f"model.weights = {file}: there is no such file", "Name a local one, which every node sees.")
    with torch.device("cpu" if file else "meta"):
        tower = image_tower(model.tower, model.image_arguments, file)
        Matcher(matcher_config(model, 0), len(SIGNS), backbone=tower)
        if file and not _alike(tower, image_tower(model.tower, model.image_arguments, file)):
            raise ConfigError(
                f"model.weights = {file}: {model.tower} has no weights of these names",
                "Give a state dict as timm's model of this name has it.",
            )


def _alike(tower: nn.Module, again: nn.Module) -> bool:
    """Whether two that were built one after the other share a weight that is not constant: timm says nothing where a
    file lacks one, and leaves it random."""
    both = zip(tower.parameters(), again.parameters(), strict=True)
    return any(torch.equal(one, other) and bool(one.std() > 0) for one, other in both if one.numel() > 1)


def _shards(inputs: list[str], config: TrainConfig) -> list[Shard]:
    return sources.plan_shards(inputs, config.format, config.read, Store(options=config.storage), {})[0]


def resolved(config: TrainConfig, cluster: Cluster) -> TrainConfig:
    """The same settings without "auto". Raises: PreflightError for what would leave the run waiting for ever."""
    workers, optim = config.workers, config.optim
    gpus = workers.gpus_per_worker
    gpus = (1.0 if cluster.gpus else 0.0) if gpus == "auto" else gpus
    room = max(1, int(cluster.gpus // gpus)) if gpus else 1
    count = int(workers.workers) if workers.workers != "auto" else _most_workers(optim.batch_size, room)
    threads = workers.threads
    if threads == "auto":
        threads = max(1, int(cluster.node_cpus) // ceil(count / cluster.nodes))
    precision = optim.precision if optim.precision != "auto" else "bf16" if gpus else "fp32"
    chosen = {"workers": count, "gpus_per_worker": gpus, "threads": threads}
    config = config.model_copy(
        update={
            "workers": workers.model_copy(update=chosen),
            "optim": optim.model_copy(update={"precision": precision}),
        }
    )
    _require_workers(config, cluster)
    beside_mib = config.shuffled_mib * ceil(count / cluster.nodes)
    require_decode_memory(config.decode, config.cluster, cluster, Beside(beside_mib, "shuffling", "data.shuffle"))
    return config


def _most_workers(batch_size: int, room: int) -> int:
    """That share out a batch, of which each gets two pairs at least."""
    return max(count for count in range(1, min(room, batch_size // 2) + 1) if batch_size % count == 0)


def _require_workers(config: TrainConfig, cluster: Cluster) -> None:
    workers, spare, batch_size = config.workers, config.cluster.spare_cpus, config.optim.batch_size
    count, cpus, gpus = int(workers.workers), workers.cpus_per_worker, float(workers.gpus_per_worker)
    if count * cpus + spare > cluster.cpus or count * gpus > cluster.gpus:
        raise PreflightError(
            f"{count} workers of {cpus:g} CPUs and {gpus:g} GPUs, and {spare:g} CPUs to spare for reading and "
            f"decoding, need {count * cpus + spare:g} and {count * gpus:g}; the cluster has {cluster.cpus:g} and "
            f"{cluster.gpus:g}",
            "Lower workers.workers, workers.cpus_per_worker or workers.gpus_per_worker.",
        )
    if gpus > cluster.node_gpus or cpus > cluster.node_cpus:
        raise PreflightError(
            f"A worker of {gpus:g} GPUs and {cpus:g} CPUs fits no node: the largest has {cluster.node_gpus:g} and "
            f"{cluster.node_cpus:g}",
            "Lower workers.gpus_per_worker or workers.cpus_per_worker.",
        )
    if batch_size % count or batch_size // count < 2:
        raise PreflightError(
            f"optim.batch_size = {batch_size} cannot be shared out among {count} workers",
            f"Take a multiple of {count}, of 2 pairs a worker at least.",
        )


def _recorded(store: Store) -> dict[str, Any] | None:
    """What the output's run was started with."""
    try:
        return dict(json.loads(store.read(RECORD)))
    except FileNotFoundError:
        return None


def _as_recorded(config: TrainConfig, before: dict[str, Any] | None) -> TrainConfig:
    """With the recorded precision, where it is left open: a cluster of other devices goes on as the run began."""
    if before is None or config.optim.precision != "auto":
        return config
    precision = before["settings"]["optim"]["precision"]
    return config.model_copy(update={"optim": config.optim.model_copy(update={"precision": precision})})


def _require_same(store: Store, before: dict[str, Any], record: dict[str, Any]) -> None:
    """Raises: PreflightError that shows how this run differs from the one that the output has."""
    if changed := differences(before, json.loads(json.dumps(record))):
        shown = "\n  ".join(changed[:12])
        raise PreflightError(
            f"{store.root} holds a run with other settings or another input:\n  {shown}",
            "Give this one another output, or restore what is shown above to go on with that run.",
        )


# -- the run -------------------------------------------------------------------------------------


def train(
    run: TrainRun,
    on_progress: OnProgress = lambda stages: None,
    say: Say = lambda line: None,
    on_survey: Callable[[Task], None] = lambda task: None,
) -> dict[str, Any]:
    """Trains what is left, and returns the run's metrics. Ray must be connected.

    on_survey: told once, before the first step. Raises: VecmillError; the last checkpoint stays.
    """
    require_output(run.store)
    with held(run.store, "train", "train", say=say):
        run.store.put_atomic(RECORD, json.dumps(run.record, indent=2).encode())
        meter = start_meter()
        with plain_errors(no_progress_timeout_s=run.config.cluster.no_progress_timeout_s):
            configure(run.config)
            task = Task(run.config, survey(run, say), run.store, RemoteObserve(meter))
            on_survey(task)
            with reporting(meter, on_progress, 1.0):
                fit(run, task)
        unreadable = int(reading(meter).get("decode", {}).get("unreadable", 0))
        if unreadable:
            say(f"{unreadable:,} times an image could not be read, and was left out")
        return read_history(run.store)


def survey(run: TrainRun, say: Say) -> Survey:
    """As an earlier attempt recorded it, else by reading the samples through, their images left alone.

    Raises: InputError where there is nothing to train on, or to evaluate on.
    """
    try:
        return Survey.parse(run.store.read(SURVEY))
    except FileNotFoundError:
        say(
            f"Reading all {len(run.shards):,} shards through once, for the words and identities of what is trained on; "
            "it shows no progress"
        )
    require_evaluated(run)
    rows = examples(run.shards, run.train_part, run.config, nowhere, pixels=False)
    counts = rows.map_batches(Count(bool(run.config.loss.cmpc)), batch_format="pyarrow", batch_size=None)
    found = add_up((row["counts"] for row in counts.iter_rows()), run.config.model.vocab_size)
    if found.captions < 2:
        raise InputError(
            f"{', '.join(run.config.input)}: {found.images} samples to train on, with {found.captions} captions",
            f"Each needs an image, a caption and, by data.identity, its {run.config.data.identity}; see data.train.",
        )
    require_together(run.config, found)
    run.store.put_atomic(SURVEY, found.json().encode())
    return found


def require_together(config: TrainConfig, found: Survey) -> None:
    """Raises: InputError where data.together is nothing that any sample has."""
    if config.data.together and not found.together:
        raise InputError(
            f"{', '.join(config.input)}: none of the {found.images:,} samples to train on has "
            f"{config.data.together!r} in its metadata",
            "See data.together.",
        )


def require_evaluated(run: TrainRun) -> None:
    """Reads no further than the first sample. Raises: InputError where there is none."""
    if run.val_shards and not examples(run.val_shards, run.val_part, run.config, nowhere, pixels=False).take(1):
        raise InputError(
            f"{', '.join(run.config.data.val_input or run.config.input)}: no sample to evaluate on",
            "Each needs an image, a caption and, by data.identity, its "
            f"{run.config.data.identity}; see data.val, data.val_input and data.split.",
        )


def examples(shards: list[Shard], part: Part, config: TrainConfig, observe: Observe, pixels: bool = True) -> Any:
    """A Ray data set of EXAMPLE rows, in the order of the shards."""
    pending = [Work(shard, ("train",)) for shard in shards]
    rows = ray.data.read_datasource(
        ShardSource(pending, config.read, Store(options=config.storage)), override_num_blocks=len(pending)
    )
    transform = _transform(config) if pixels else None
    rows = rows.map_batches(
        Examples(part, config.decode, transform, observe),
        batch_format="pyarrow",
        batch_size=None,
        memory=config.cluster.memory_per_decode_task_mib * 2**20,
    )
    return rows.materialize() if pixels and config.data.cache else rows


def _transform(config: TrainConfig) -> Any:
    return image_transform(matcher_config(config.model, 0))


def configure(config: TrainConfig) -> None:
    """Ray Data's settings, made before any data set is: they are sealed into it."""
    context = DataContext.get_current()
    context.max_errored_blocks = 0
    context.enable_progress_bars = False
    context.execution_options.preserve_order = True
    context.execution_options.verbose_progress = False
    context.execution_no_progress_timeout_s = config.cluster.no_progress_timeout_s


def work(told: dict[str, Any]) -> None:
    """The function of each worker that Ray Train starts. told: its Task under `task`."""
    task: Task = told["task"]
    with plain_errors(no_progress_timeout_s=task.config.cluster.no_progress_timeout_s):
        for figures in Worker(task, place()).run():
            ray.train.report(figures)


def place() -> Place:
    """Of the worker that asks."""
    context = ray.train.get_context()
    return Place(context.get_world_rank(), context.get_world_size(), ray.train.torch.get_device(), _tables)


def _tables(name: str, rows: int) -> Iterable[pa.Table]:
    return ray.train.get_dataset_shard(name).iter_batches(batch_size=rows, batch_format="pyarrow")  # type: ignore[no-any-return]


def fit(run: TrainRun, task: Task, work: Callable[[dict[str, Any]], None] = work) -> None:
    """Workers that died are started again, config.workers.failures times.

    Raises: Ray's own error, with those of the workers.
    """
    workers = run.config.workers
    data = {"train": examples(run.shards, run.train_part, run.config, task.observe)}
    if run.val_shards:
        data["val"] = examples(run.val_shards, run.val_part, run.config, task.observe)
    resources = {
        "CPU": workers.cpus_per_worker,
        "GPU": float(workers.gpus_per_worker),
        "memory": run.config.shuffled_mib * 2**20,
    }
    with scratch_folder() as folder:
        trainer = Trainer(
            work,
            train_loop_config={"task": task},
            datasets=data,
            dataset_config=SplitBetweenWorkers(
                datasets_to_split=["train"], execution_options=ExecutionOptions(preserve_order=True)
            ),
            scaling_config=ScalingConfig(
                num_workers=int(workers.workers),
                use_gpu=bool(workers.gpus_per_worker),
                resources_per_worker={name: count for name, count in resources.items() if count},
            ),
            run_config=RunConfig(
                name="train", storage_path=str(Path(folder)), failure_config=FailureConfig(workers.failures)
            ),
        )
        trainer.fit()
