"""`vecmill train`."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Annotated, Any

import typer

from jobs import options
from jobs.cluster import connected
from jobs.console import LiveProgress, err, out, print_plan, size
from pipelines.config import load_settings
from pipelines.observe import Stages, duration
from pipelines.storage import Store, whole_uri

if TYPE_CHECKING:
    from pipelines.training.loop import Task
    from pipelines.training.settings import TrainConfig
    from pipelines.training.train import TrainRun

Recipe = Annotated[str, typer.Argument(help="A recipe (.yaml), as those in jobs/recipes/training.", show_default=False)]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print what would be done and change nothing.")]
Epochs = Annotated[int | None, typer.Option(help="Epochs, in place of the recipe's.")]
Workers = Annotated[int | None, typer.Option(help="Workers, in place of the recipe's.")]


def train(
    recipe: Recipe,
    output: options.Output = None,
    epochs: Epochs = None,
    workers: Workers = None,
    set: options.Set = None,
    address: options.Address = None,
    dry_run: DryRun = False,
) -> None:
    """Train an image tower and a text tower into one space. Run it again to go on from the last checkpoint.

    What comes out is an encoder: vecmill embed … --encoder matcher:OUTPUT/model

    Example: vecmill train jobs/recipes/training/cuhk-pedes.yaml --output s3://bucket/pedes
    """
    from pipelines.training.settings import TrainConfig

    flags = {"output": output, "optim.epochs": epochs, "workers.workers": workers, "cluster.address": address}
    config = load_settings(TrainConfig, recipe, {**flags, **options.assignments_of(set)})
    config = with_whole_paths(config)
    with connected(config.cluster.address) as cluster:
        from pipelines.training.train import prepare_training

        run = prepare_training(config, cluster)
        if dry_run:
            show_plan(run)
        else:
            run_training(run)


def with_whole_paths(config: TrainConfig) -> TrainConfig:
    """Local paths as seen from any folder."""

    def whole(inputs: list[str]) -> list[str]:
        return [item if "://" in item else whole_uri(item) for item in inputs]

    val, output = config.data.val_input, options.output_store_root(config.output)
    data = config.data.model_copy(update={"val_input": whole(val) if val else None})
    paths: dict[str, Any] = {"input": whole(config.input), "output": output, "data": data}
    if config.model.weights_file:
        # A worker has a working folder of its own.
        paths["model"] = config.model.model_copy(update={"weights": whole([config.model.weights_file])[0]})
    return config.model_copy(update=paths)


def show_plan(run: TrainRun) -> None:
    config, workers, optim = run.config, run.config.workers, run.config.optim
    print_plan(
        {
            "input": ", ".join(config.input),
            "shards": f"{len(run.shards):,} ({size(sum(shard.bytes for shard in run.shards))})",
            "evaluated on": _evaluated_on(config),
            "identity": config.data.identity,
            "image tower": f"{config.model.tower}, from {config.model.weights or 'random weights'}",
            "loss": " ".join(f"{key}={value}" for key, value in config.loss.model_dump().items()),
            "optim": " ".join(f"{key}={value}" for key, value in optim.model_dump().items()),
            "workers": f"{workers.workers} of {workers.gpus_per_worker:g} GPUs and {workers.cpus_per_worker:g} CPUs",
            "done": f"{done(run)} of {optim.epochs}",
            "output": run.store.uri("model"),
        }
    )
    out.print("Nothing was changed. Run `vecmill train` with the same arguments to start.")


def done(run: TrainRun) -> str:
    """`3 epochs`, `3 epochs and 500 steps`."""
    epochs, steps = run.done
    return f"{epochs:,} epochs" + (f" and {steps:,} steps" if steps else "")


def _evaluated_on(config: TrainConfig) -> str:
    data = config.data
    if data.val_input:
        return ", ".join(data.val_input)
    if data.split:
        return f"{data.split.val:.0%} of the input, split by {data.split.by}"
    return f"samples whose split is {data.val}" if data.val else "nothing: the last epoch's weights are kept"


def run_training(run: TrainRun) -> None:
    from pipelines.training.checkpoint import read_history
    from pipelines.training.train import train as train_what_is_left

    if run.finished:
        out.print("The run is finished; nothing is left to do.")
        return show_result(run.store, read_history(run.store), run.store.uri("model"))
    if any(run.done):
        err.print(f"{done(run)} were done before; going on from their checkpoint.")
    with TrainProgress(run) as progress:
        history = train_what_is_left(
            run, progress, lambda line: err.print(line, markup=False), on_survey=progress.surveyed
        )
    show_result(run.store, history, run.store.uri("model"))


def show_result(store: Store, history: dict[str, Any], model: str) -> None:
    best = next(told for told in history["epochs"] if told["epoch"] == history["best_epoch"])
    out.print(f"{len(history['epochs'])} epochs; the model is of epoch {best['epoch']}.", markup=False)
    out.print(f"  {epoch_line(best)}", markup=False)
    out.print(f"  model:   {model}", markup=False)
    out.print(f"  metrics: {store.uri('metrics.json')}, {store.uri('curves.png')}", markup=False)
    out.print(f"  vecmill embed … --encoder 'matcher:{model}'", markup=False)


def epoch_line(told: dict[str, Any]) -> str:
    """`epoch 3  loss 2.3451 …`, without what the epoch has not."""
    parts = [f"epoch {told['epoch']}", f"loss {told['loss']:.4f}"]
    if "image_precision" in told:
        parts.append(f"precision {told['image_precision']:.1%}/{told['text_precision']:.1%}")
    parts.append(f"similarity {told['matched_similarity']:.3f}/{told['unmatched_similarity']:.3f}")
    for direction, short in (("text_to_image", "text→image"), ("image_to_text", "image→text")):
        if direction in told:
            parts.append(f"{short} R@1/5/10 " + "/".join(f"{told[direction][f'recall@{k}']:.1%}" for k in (1, 5, 10)))
    return "  ".join([*parts, duration(told["seconds"])])


class TrainProgress(LiveProgress):
    """Of training, in steps; and a line for each epoch."""

    def __init__(self, run: TrainRun) -> None:
        self._store, self._epochs, self._done = run.store, run.config.optim.epochs, run.done
        self._told = run.done[0]
        self._steps = self._before = 0
        self._losses = self._loss_sum = self._loss = 0.0
        told = "{task.fields[rate]:.0f} pairs/s, loss {task.fields[loss]:.3f}"
        super().__init__("training", "steps", told, None, rate=0.0, loss=0.0)

    def surveyed(self, task: Task) -> None:
        found, per_epoch = task.survey, task.steps_per_epoch
        self._steps, self._before = per_epoch * self._epochs, per_epoch * self._done[0] + self._done[1]
        self._started = time.monotonic()
        classes = f", {len(found.classes):,} identities" if found.classes else ""
        err.print(
            f"{found.images:,} images with {found.captions:,} captions{classes}, {len(found.vocabulary):,} words; "
            f"{per_epoch:,} steps an epoch",
            markup=False,
        )

    def __call__(self, stages: Stages) -> None:
        now = stages.get("train", {})
        if int(now.get("epochs", 0)):
            self._tell_epochs()
        steps, elapsed = int(now.get("steps", 0)), time.monotonic() - self._started
        rate = now.get("rows", 0.0) / elapsed if elapsed else 0.0
        loss = self._latest(now.get("losses", 0.0), now.get("loss", 0.0))
        self.show(
            lambda: self._line(steps, rate, elapsed),
            total=self._steps or None,
            completed=self._before + steps,
            rate=rate,
            loss=loss,
        )

    def _latest(self, losses: float, total: float) -> float:
        """The loss of the epoch so far, as last told. losses, total: how many were told in all, and their sum."""
        if losses > self._losses:
            self._loss = (total - self._loss_sum) / (losses - self._losses)
            self._losses, self._loss_sum = losses, total
        return self._loss

    def _line(self, steps: int, rate: float, elapsed: float) -> dict[str, Any]:
        left = max(0, self._steps - self._before - steps) * elapsed / steps if steps else None
        return {
            "steps_done": self._before + steps,
            "steps": self._steps,
            "pairs_per_second": round(rate, 1),
            "elapsed_s": round(elapsed),
            "eta_s": None if left is None else round(left),
        }

    def _tell_epochs(self) -> None:
        from pipelines.training.checkpoint import read_history

        history = read_history(self._store)["epochs"]
        for told in history[self._told :]:
            err.print(epoch_line(told), markup=False)
        self._told = max(self._told, len(history))
