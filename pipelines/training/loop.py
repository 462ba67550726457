"""What every worker does, on one CPU or one of many GPUs: epochs of steps, evaluation, checkpoints.

All that is random comes from the seed, the epoch and the worker's rank, and a checkpoint within an epoch has how far
the draws are, so that a step goes the same whether or not the run was killed before it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, cast

import torch
from timm.models import get_pretrained_cfg
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from pipelines.encoders.batch import DTYPES
from pipelines.encoders.matcher_folder import MatcherConfig
from pipelines.encoders.matcher_model import Matcher, image_tower
from pipelines.errors import VecmillError
from pipelines.observe import Observe
from pipelines.storage import Store
from pipelines.training.batches import Pair, hashed
from pipelines.training.checkpoint import CURVES, METRICS, Position, last_checkpoint, save_checkpoint, save_model
from pipelines.training.curves import draw_curves
from pipelines.training.feed import Feed
from pipelines.training.history import History, best, exhausted
from pipelines.training.network import Network
from pipelines.training.place import Place
from pipelines.training.schedule import averaging, learning_rate
from pipelines.training.settings import HALF, ModelConfig, TrainConfig, Triple
from pipelines.training.survey import Survey
from pipelines.training.tally import Tally
from pipelines.training.validation import validate

TOLD_EVERY = 20
"""Steps from one reading of the loss to the next: reading it waits for the device."""


@dataclass(frozen=True)
class Task:
    """What a worker is told. config holds no "auto" any more."""

    config: TrainConfig
    survey: Survey
    store: Store
    observe: Observe

    @property
    def steps_per_epoch(self) -> int:
        """As the survey counted; images that then cannot be read make it a few less."""
        data = self.config.data
        pairs = self.survey.captions if data.captions == "each" else self.survey.images
        return max(1, pairs // self.config.optim.batch_size)

    @property
    def matcher(self) -> MatcherConfig:
        return matcher_config(self.config.model, len(self.survey.classes))


def _finite(network: nn.Module) -> bool:
    return all(bool(value.isfinite().all()) for value in network.state_dict().values())


def matcher_config(model: ModelConfig, classes: int) -> MatcherConfig:
    mean, std = normalisation(model)
    return MatcherConfig(
        image_tower=model.tower,
        embed_dim=model.embed_dim,
        lstm_hidden=model.lstm_hidden,
        word_dim=model.word_dim,
        max_words=model.max_words,
        image_size=model.image_size,
        mean=mean,
        std=std,
        num_classes=classes,
        image_arguments=model.image_arguments,
    )


def normalisation(model: ModelConfig) -> tuple[Triple, Triple]:
    """Mean and deviation of the channels: those given, else those that timm's weights of the tower were trained with,
    where it starts from weights; else one half."""
    known = get_pretrained_cfg(model.tower) if model.weights else None
    mean, std = (known.mean, known.std) if known else (HALF, HALF)
    return cast(Triple, model.mean or mean), cast(Triple, model.std or std)


class Worker:
    """A network on one device, its optimiser and its average, and the history of the run.

    epoch: epochs that are done. tally: of the next, so far.
    """

    def __init__(self, task: Task, place: Place) -> None:
        self.task, self.place, self.config, self.optim = task, place, task.config, task.config.optim
        self.feed = Feed(self.config, task.matcher, task.survey, place)
        self.epoch, self.tally = 0, Tally()
        self.history: History = []
        if place.device.type == "cpu":
            torch.set_num_threads(int(self.config.workers.threads))
        state = last_checkpoint(task.store, place.device)
        self._build(None if state else self.config.model.weights)
        if state:
            self._restore(state)

    # -- what is trained -------------------------------------------------------------------------

    def _build(self, weights: str | None) -> None:
        """weights: that the image tower starts from."""
        model, survey = self.config.model, self.task.survey
        torch.manual_seed(self.optim.seed)
        backbone = image_tower(model.tower, model.image_arguments, weights)
        matcher = Matcher(self.task.matcher, len(survey.vocabulary), model.dropout, backbone)
        self.network = Network(matcher, len(survey.classes), self.config.loss).to(self.place.device)
        self.optimiser = torch.optim.Adam(self._groups(), lr=self.optim.lr, eps=1e-8)
        self.scaler = torch.amp.GradScaler(self.place.device.type, enabled=self.optim.precision == "fp16")
        average = averaging(self.optim.ema)
        self.averaged = AveragedModel(self.network, multi_avg_fn=average, use_buffers=True) if self.optim.ema else None

    def _groups(self) -> list[dict[str, Any]]:
        """Weights decay in the backbone alone."""
        backbone = list(self.network.matcher.image_tower.parameters())
        theirs = {id(weight) for weight in backbone}
        others = [weight for weight in self.network.parameters() if id(weight) not in theirs]
        return [{"params": backbone, "weight_decay": self.optim.weight_decay}, {"params": others}]

    def _restore(self, state: dict[str, Any]) -> None:
        self.network.load_state_dict(state["network"])
        self.optimiser.load_state_dict(state["optimiser"])
        self.scaler.load_state_dict(state["scaler"])
        if self.averaged is not None:
            self.averaged.load_state_dict(state["averaged"])
        self.epoch, self.tally, self.history = state["epoch"], Tally(**state["tally"]), json.loads(state["history"])
        if self.place.rank:
            torch.manual_seed(hashed(f"{self.optim.seed} {self.position} {self.place.rank}"))
        else:
            self.place.set_draws(state["draws"])
            if not self.tally.steps:
                self._put_results()

    def _state(self) -> dict[str, Any]:
        return {
            "network": self.network.state_dict(),
            "optimiser": self.optimiser.state_dict(),
            "scaler": self.scaler.state_dict(),
            "averaged": self.averaged.state_dict() if self.averaged is not None else {},
            "epoch": self.epoch,
            "tally": self.tally.state(),
            "history": json.dumps(self.history),
            "draws": self.place.draws(),
        }

    @property
    def position(self) -> Position:
        return self.epoch, self.tally.steps

    @property
    def frozen(self) -> bool:
        return self.epoch < self.optim.frozen_epochs

    @property
    def evaluated(self) -> Matcher:
        """With averaged weights, where there are some."""
        network = self.averaged.module if self.averaged is not None else self.network
        return network.matcher  # type: ignore[return-value]

    # -- the run ---------------------------------------------------------------------------------

    def run(self) -> Iterator[dict[str, Any]]:
        """Each epoch's figures, when what it made is kept."""
        parallel, stage = self._parallel(), self.frozen
        while self.epoch < self.optim.epochs and not self._stopped():
            if self.frozen != stage:
                parallel, stage = self._parallel(), self.frozen
            yield self._epoch(parallel)

    def _parallel(self) -> nn.Module:
        """Made anew when what is trained changes."""
        for weight in self.network.matcher.image_tower.parameters():
            weight.requires_grad_(not self.frozen)
        return self.place.parallel(self.network)

    def _stopped(self) -> bool:
        """As the first worker says, which alone knows."""
        return not self.place.all(not self._exhausted())

    def _exhausted(self) -> bool:
        return exhausted(self.history, self.config.stop)

    def _is_last(self) -> bool:
        return self.epoch == self.optim.epochs

    def _epoch(self, parallel: nn.Module) -> dict[str, Any]:
        self._train(parallel)
        tally, self.tally = self.tally, Tally()
        self.epoch += 1
        rate = self.optimiser.param_groups[0]["lr"]
        told = {"epoch": self.epoch, "seconds": tally.seconds, "steps": tally.steps, "pairs": tally.pairs, "lr": rate}
        told |= tally.means()
        if "loss" not in told or not _finite(self.network):
            what = "some weights overflowed" if "loss" in told else "no step had a finite loss"
            raise VecmillError(
                f"In epoch {self.epoch} {what}",
                "Lower optim.lr, set optim.clip_norm, or set optim.precision to fp32, and start with another output.",
            )
        if self.config.evaluates and (self.epoch % self.config.stop.every == 0 or self._is_last()):
            size, most = self.task.matcher.image_size, self.config.data.val_images
            told |= validate(self.evaluated, size, most, self.feed, self.place)
        self.history.append(told)
        self._keep()
        return told

    def _train(self, parallel: nn.Module) -> None:
        """What is left of the epoch. Raises: VecmillError where it has no batch."""
        parallel.train()
        if self.frozen:
            self.network.matcher.image_tower.eval()
        if not self.tally.steps:
            # Its seconds are those of training alone.
            self.tally = Tally()
            torch.manual_seed(hashed(f"{self.optim.seed} {self.epoch} {self.place.rank}") % 2**31)
        for batch in self.feed.batches(self.epoch, self.tally.steps):
            self.tally.add(self._step(parallel, batch), len(batch) * self.place.workers)
            self._tell(len(batch))
            self._keep_midway()
        if not self.tally.steps:
            raise VecmillError(
                f"Epoch {self.epoch + 1} had no batch: fewer pairs than workers came",
                "Lower optim.batch_size or workers.workers, or see how many samples can be read.",
            )

    def _step(self, parallel: nn.Module, batch: list[Pair]) -> dict[str, Tensor]:
        for group in self.optimiser.param_groups:
            group["lr"] = learning_rate(*self.position, self.task.steps_per_epoch, self.optim)
        with self._autocast():
            told: dict[str, Tensor] = parallel(*self.feed.tensors(batch))
        self.optimiser.zero_grad(set_to_none=True)
        self.scaler.scale(told["loss"]).backward()  # type: ignore[no-untyped-call]
        self.scaler.unscale_(self.optimiser)
        limit = self.optim.clip_norm or torch.inf
        norm = nn.utils.clip_grad_norm_([w for w in self.network.parameters() if w.grad is not None], limit)
        finite = torch.isfinite(norm)
        # The scaler looks by itself. A step by what is not finite would leave nothing of the weights.
        if self.scaler.is_enabled() or finite:
            self.scaler.step(self.optimiser)
            self.scaler.update()
            self.network.keep_in_bounds()
        if self.averaged is not None:
            self.averaged.update_parameters(self.network)
        return {**told, "gradient_norm": norm, "steps_left_out": (~finite).float()}

    def _autocast(self) -> AbstractContextManager[Any]:
        precision = self.optim.precision
        return torch.autocast(self.place.device.type, DTYPES[precision], enabled=precision != "fp32")

    def _tell(self, pairs: int) -> None:
        first, tally = self.place.rank == 0, self.tally
        self.task.observe(stage="train", rows=pairs, steps=int(first))
        if first and tally.steps % TOLD_EVERY == 0:
            self.task.observe(stage="train", losses=1, loss=tally.means().get("loss", 0.0))

    # -- what is kept, by the first worker -------------------------------------------------------

    def _keep_midway(self) -> None:
        every = self.config.checkpoint.every_steps
        if self.place.rank == 0 and every and self.tally.steps % every == 0:
            save_checkpoint(self.task.store, self.position, self._state())

    def _keep(self) -> None:
        """The checkpoint first: a run that dies after it puts the rest again from it. An epoch that is done again may
        end with other weights, and the model would not be of the metrics."""
        if self.place.rank == 0:
            save_checkpoint(self.task.store, self.position, self._state())
            self._put_results()
            self.task.observe(stage="train", epochs=1)

    def _put_results(self) -> None:
        """At an epoch's end: the model, where none was better, and then the metrics, which say whether it was the
        last."""
        store, at = self.task.store, best(self.history, self.config.stop)
        if at == len(self.history) - 1:
            model, vocabulary = self.config.model, self.task.survey.vocabulary
            save_model(store, self.evaluated, self.task.matcher, vocabulary, model.dtype)
        store.put_atomic(CURVES, draw_curves(self.history))
        finished = self._is_last() or self._exhausted()
        told = {"finished": finished, "best_epoch": self.history[at]["epoch"], "epochs": self.history}
        store.put_atomic(METRICS, json.dumps(told, indent=2).encode())
