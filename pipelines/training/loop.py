"""What every worker does, on one CPU or one of many GPUs: epochs of steps, evaluation, checkpoints.

Ray Train starts it; the first worker alone writes. All that is random comes from the seed, the epoch and the worker's
rank, so that an epoch goes the same whether or not the run was killed before it.
"""

from __future__ import annotations

import json
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from random import Random
from typing import Any

import numpy as np
import ray.train
import ray.train.torch
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.optim.swa_utils import AveragedModel

from pipelines.encoders.batch import DTYPES, Normalize, padded
from pipelines.encoders.matcher import image_transform
from pipelines.encoders.matcher_folder import MatcherConfig
from pipelines.encoders.matcher_model import Matcher, image_tower
from pipelines.encoders.matcher_text import WordTokenizer
from pipelines.encoders.torch_encoder import masked
from pipelines.errors import VecmillError
from pipelines.observe import Observe
from pipelines.storage import Store
from pipelines.training.batches import Pair, batches, hashed, pairs, shuffled
from pipelines.training.checkpoint import METRICS, last_checkpoint, save_checkpoint, save_model
from pipelines.training.examples import pixels_in
from pipelines.training.losses import unit
from pipelines.training.network import Network
from pipelines.training.retrieval import recalls
from pipelines.training.schedule import averaging, learning_rate
from pipelines.training.settings import ModelConfig, TrainConfig
from pipelines.training.survey import Survey

READ_ROWS = 128
EVALUATED_AT_ONCE = 128


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


def matcher_config(model: ModelConfig, classes: int) -> MatcherConfig:
    return MatcherConfig(
        image_tower=model.tower,
        embed_dim=model.embed_dim,
        lstm_hidden=model.lstm_hidden,
        word_dim=model.word_dim,
        max_words=model.max_words,
        image_size=model.image_size,
        mean=model.mean,
        std=model.std,
        num_classes=classes,
        image_arguments=model.image_arguments,
    )


def work(told: dict[str, Any]) -> None:
    """The function of each worker. told: its Task under `task`."""
    Worker(told["task"]).run()


class Worker:
    """A network on one device, its optimiser and its average, and the history of the run."""

    def __init__(self, task: Task) -> None:
        context = ray.train.get_context()
        self.task, self.config, self.optim = task, task.config, task.config.optim
        self.rank, self.world = context.get_world_rank(), context.get_world_size()
        self.device = ray.train.torch.get_device()
        if self.device.type == "cpu":
            torch.set_num_threads(int(self.config.workers.threads))
        self.tokenize = WordTokenizer(task.survey.vocabulary, task.matcher.max_words)
        self.normalize = Normalize(image_transform(task.matcher), self.device, torch.float32)
        self.classes = {identity: at for at, identity in enumerate(task.survey.classes)}
        self.epoch = self.step = self.updates = 0
        self.history: list[dict[str, Any]] = []
        self._build()
        self._restore()

    # -- what is trained -------------------------------------------------------------------------

    def _build(self) -> None:
        model = self.config.model
        torch.manual_seed(self.optim.seed)
        backbone = image_tower(model.tower, model.image_arguments, model.weights)
        matcher = Matcher(self.task.matcher, len(self.task.survey.vocabulary), model.dropout, backbone)
        self.network = Network(matcher, len(self.classes), self.config.loss).to(self.device)
        backbone_weights = list(self.network.matcher.image_tower.parameters())
        theirs = {id(weight) for weight in backbone_weights}
        others = [weight for weight in self.network.parameters() if id(weight) not in theirs]
        groups: list[dict[str, Any]] = [
            {"params": backbone_weights, "weight_decay": self.optim.weight_decay},
            {"params": others},
        ]
        self.optimiser = torch.optim.Adam(groups, lr=self.optim.lr, eps=1e-8)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.optim.precision == "fp16")
        self.averaged = (
            AveragedModel(self.network, multi_avg_fn=averaging(self.optim.ema), use_buffers=True)
            if self.optim.ema
            else None
        )

    def _restore(self) -> None:
        state = last_checkpoint(self.task.store, self.device)
        if state is not None:
            self.network.load_state_dict(state["network"])
            self.optimiser.load_state_dict(state["optimiser"])
            self.scaler.load_state_dict(state["scaler"])
            if self.averaged is not None:
                self.averaged.load_state_dict(state["averaged"])
            self.epoch, self.step, self.history = state["epoch"], state["step"], json.loads(state["history"])

    def _state(self) -> dict[str, Any]:
        return {
            "network": self.network.state_dict(),
            "optimiser": self.optimiser.state_dict(),
            "scaler": self.scaler.state_dict(),
            "averaged": self.averaged.state_dict() if self.averaged is not None else {},
            "epoch": self.epoch,
            "step": self.step,
            "history": json.dumps(self.history),
        }

    @property
    def frozen(self) -> bool:
        return self.epoch < self.optim.frozen_epochs

    @property
    def evaluated(self) -> Matcher:
        """With averaged weights, where there are some."""
        network = self.averaged.module if self.averaged is not None else self.network
        return network.matcher  # type: ignore[return-value]

    # -- the run ---------------------------------------------------------------------------------

    def run(self) -> None:
        parallel, stage = self._parallel(), self.frozen
        while self.epoch < self.optim.epochs and not self._stopped():
            if self.frozen != stage:
                parallel, stage = self._parallel(), self.frozen
            started = time.monotonic()
            told = self._train_epoch(parallel)
            self.epoch += 1
            told = {"epoch": self.epoch, "seconds": round(time.monotonic() - started, 3), **told}
            if self.config.evaluates and (self.epoch % self.config.stop.every == 0 or self._is_last()):
                told |= self._evaluate()
            self.history.append(told)
            self._write()
            ray.train.report(told)

    def _is_last(self) -> bool:
        return self.epoch == self.optim.epochs

    def _parallel(self) -> Any:
        """The network as all workers train it together; made anew when what is trained changes."""
        for weight in self.network.matcher.image_tower.parameters():
            weight.requires_grad_(not self.frozen)
        if self.world == 1:
            return self.network
        return ray.train.torch.prepare_model(self.network, move_to_device=False)

    def _train_epoch(self, parallel: Any) -> dict[str, Any]:
        parallel.train()
        if self.frozen:
            self.network.matcher.image_tower.eval()
        torch.manual_seed(hashed(f"{self.optim.seed} {self.epoch} {self.rank}") % 2**31)
        totals: dict[str, Tensor] = defaultdict(lambda: torch.zeros((), device=self.device))
        steps = seen = 0
        for batch in self._agreed(self._batches()):
            for name, value in self._step(parallel, batch).items():
                totals[name] += value.detach()
            steps, seen = steps + 1, seen + len(batch) * self.world
            self._tell(len(batch), totals["loss"], steps)
        if not steps:
            raise VecmillError(
                f"Epoch {self.epoch + 1} had no batch: fewer pairs than workers came",
                "Lower optim.batch_size or workers.workers, or see how many samples can be read.",
            )
        means = {name: float(total) / steps for name, total in totals.items()}
        return {"steps": steps, "pairs": seen, "lr": self.optimiser.param_groups[0]["lr"], **means}

    def _tell(self, pairs: int, loss: Tensor, steps: int) -> None:
        """The loss is read from the device now and then: reading it waits for the device."""
        self.task.observe(stage="train", rows=pairs, steps=int(self.rank == 0))
        if self.rank == 0 and steps % 20 == 0:
            self.task.observe(stage="train", losses=1, loss=float(loss) / steps)

    def _step(self, parallel: Any, batch: list[Pair]) -> dict[str, Tensor]:
        for group in self.optimiser.param_groups:
            group["lr"] = learning_rate(self.step, self.task.steps_per_epoch, self.optim)
        with self._autocast():
            told = parallel(*self._tensors(batch))
        self.optimiser.zero_grad(set_to_none=True)
        self.scaler.scale(told["loss"]).backward()
        self.scaler.unscale_(self.optimiser)
        limit = self.optim.clip_norm or torch.inf
        norm = torch.nn.utils.clip_grad_norm_([w for w in self.network.parameters() if w.grad is not None], limit)
        self.scaler.step(self.optimiser)
        self.scaler.update()
        self.step += 1
        if self.averaged is not None:
            self.averaged.update_parameters(self.network)
        return {**told, "gradient_norm": norm}

    def _autocast(self) -> AbstractContextManager[Any]:
        precision = self.optim.precision
        return torch.autocast(self.device.type, DTYPES[precision], enabled=precision != "fp32")

    # -- what it is shown ------------------------------------------------------------------------

    def _batches(self) -> Iterator[list[Pair]]:
        data, size = self.config.data, self.task.matcher.image_size
        tables = ray.train.get_dataset_shard("train").iter_batches(batch_size=READ_ROWS, batch_format="pyarrow")
        stream = pairs(tables, size, data.captions, self.epoch)
        if data.shuffle > 1:
            stream = shuffled(stream, data.shuffle, Random(f"{self.optim.seed} {self.epoch} {self.rank}"))
        return batches(stream, self.optim.batch_size // self.world)

    def _agreed(self, mine: Iterable[list[Pair]]) -> Iterator[list[Pair]]:
        """Batches for as long as every worker has one: a step is of all of them. What is left is read to its end."""
        stream = iter(mine)
        for batch in stream:
            if not self._all(True):
                break
            yield batch
        else:
            self._all(False)
        for _ in stream:
            pass

    def _all(self, mine: bool) -> bool:
        if self.world == 1:
            return mine
        flag = torch.tensor([int(mine)], device=self.device)
        torch.distributed.all_reduce(flag, torch.distributed.ReduceOp.MIN)
        return bool(flag.item())

    def _tensors(self, batch: list[Pair]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        pixels = self._pixels(np.stack([pair.pixels for pair in batch]))
        if self.config.data.flip:
            mirrored = torch.rand(len(batch), device=self.device) < 0.5
            pixels = torch.where(mirrored[:, None, None, None], pixels.flip(3), pixels)
        numbers = [self._number(pair.identity) for pair in batch]
        return pixels, *self._tokens([pair.caption for pair in batch]), torch.tensor(numbers, device=self.device)

    def _number(self, identity: str) -> int:
        return self.classes[identity] if self.classes else hashed(identity)

    def _pixels(self, images: NDArray[np.uint8]) -> Tensor:
        return self.normalize.images(torch.from_numpy(images).to(self.device, non_blocking=True))

    def _tokens(self, captions: list[str]) -> tuple[Tensor, Tensor]:
        ids, mask = masked(padded(self.tokenize(captions), self.tokenize.longest))
        return ids.to(self.device, non_blocking=True), mask.to(self.device, non_blocking=True)

    # -- evaluation ------------------------------------------------------------------------------

    @torch.no_grad()
    def _evaluate(self) -> dict[str, Any]:
        """Each worker embeds its share of the images and their captions; the first compares them all."""
        started, matcher = time.monotonic(), self.evaluated
        training = matcher.training
        matcher.eval()
        shares = self._gather(self._embedded(matcher))
        matcher.train(training)
        if self.rank:
            return {}
        images, of_images, texts, of_texts = (np.concatenate(column) for column in zip(*shares, strict=True))
        if not len(images):
            raise VecmillError("There is no sample to evaluate on.", "See data.val, data.val_input or data.split.")
        return {
            **recalls(images, of_images, texts, of_texts),
            "evaluated": {"images": len(images), "captions": len(texts), "seconds": time.monotonic() - started},
        }

    def _embedded(self, matcher: Matcher) -> tuple[NDArray[Any], ...]:
        dim = self.config.model.embed_dim
        images, texts = [np.empty((0, dim), np.float32)], [np.empty((0, dim), np.float32)]
        of_images, of_texts = [np.empty(0, np.int64)], [np.empty(0, np.int64)]
        for table in self._own_tables():
            identities = [hashed(identity) for identity in table.column("identity").to_pylist()]
            captions = table.column("captions").to_pylist()
            images.append(self._vectors(matcher.image(self._pixels(pixels_in(table, self.task.matcher.image_size)))))
            of_images.append(np.array(identities))
            flat = [text for each in captions for text in each]
            runs = (flat[at : at + EVALUATED_AT_ONCE] for at in range(0, len(flat), EVALUATED_AT_ONCE))
            texts.extend(self._vectors(matcher.text(*self._tokens(run))) for run in runs)
            of_texts.append(np.repeat(identities, [len(each) for each in captions]))
        return tuple(np.concatenate(each) for each in (images, of_images, texts, of_texts))

    def _own_tables(self) -> Iterator[Any]:
        """Every worker reads all, in one order, and takes turns: no sample is doubled or left out."""
        left = self.config.data.val_images
        tables = ray.train.get_dataset_shard("val").iter_batches(batch_size=EVALUATED_AT_ONCE, batch_format="pyarrow")
        for number, table in enumerate(tables):
            if left <= 0:
                return
            table, left = table.slice(0, left), left - table.num_rows
            if number % self.world == self.rank:
                yield table

    def _vectors(self, embeddings: Tensor) -> NDArray[np.float32]:
        return unit(embeddings.float()).cpu().numpy()

    def _gather(self, mine: Any) -> list[Any]:
        if self.world == 1:
            return [mine]
        held: list[Any] = [None] * self.world
        torch.distributed.all_gather_object(held, mine)
        return held

    # -- what is kept ----------------------------------------------------------------------------

    def _score(self, told: dict[str, Any]) -> float | None:
        stop = self.config.stop
        return told[stop.metric][f"recall@{stop.k}"] if stop.metric in told else None

    def _best(self) -> int:
        """Place in the history of the best evaluation, the last epoch where there is none."""
        scores = [(score, -at) for at, told in enumerate(self.history) if (score := self._score(told)) is not None]
        return -max(scores)[1] if scores else len(self.history) - 1

    def _exhausted(self) -> bool:
        """Whether the last `patience` evaluations brought nothing better."""
        patience = self.config.stop.patience
        since = sum(self._score(told) is not None for told in self.history[self._best() + 1 :]) if self.history else 0
        return bool(patience and since >= patience)

    def _stopped(self) -> bool:
        """As the first worker says, which alone knows."""
        return not self._all(not self._exhausted())

    def _write(self) -> None:
        """The checkpoint last: a run that dies before it does the epoch again, and writes all again."""
        if self.rank == 0:
            store, best = self.task.store, self._best()
            if best == len(self.history) - 1:
                model, vocabulary = self.config.model, self.task.survey.vocabulary
                save_model(store, self.evaluated, self.task.matcher, vocabulary, model.dtype)
            finished = self._is_last() or self._exhausted()
            told = {"finished": finished, "best_epoch": self.history[best]["epoch"], "epochs": self.history}
            store.put_atomic(METRICS, json.dumps(told, indent=2).encode())
            save_checkpoint(store, self.epoch, self._state())
            self.task.observe(stage="train", epochs=1)
