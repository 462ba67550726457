"""A run's plan, what Ray is told, and what ends a run: without Ray itself."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from ray.data import DataContext
from ray.train import FailureConfig
from ray.train.torch import TorchTrainer
from ray.train.v2._internal.execution.failure_handling import FailureDecision
from ray.train.v2.api.exceptions import WorkerGroupError

from jobs.train import TrainProgress, with_whole_paths
from pipelines.config import validate
from pipelines.errors import ConfigError, EncoderError, PreflightError, StorageError, WorkerError
from pipelines.prepare import Cluster
from pipelines.training.checkpoint import RECORD
from pipelines.training.feed import Feed
from pipelines.training.place import Place
from pipelines.training.settings import TrainConfig
from pipelines.training.train import TrainRun, configure, prepare_training
from pipelines.training.trainer import OwnErrorsEndIt, Trainer
from tests.unit.training.runs import config, examples, tables_of, task, worker

LAPTOP = Cluster(cpus=4, gpus=0, nodes=1, node_cpus=4)
TOWER = {"image_tower": "test_resnet", "image_arguments": {}}


def prepared(folder: Path, cluster: Cluster = LAPTOP, **settings: Any) -> TrainRun:
    """Of an input that nothing opens."""
    if not (folder / "shard.tar").exists():
        (folder / "shard.tar").write_bytes(b"unread")
    least = {"input": str(folder / "shard.tar"), "output": str(folder / "out"), "model": {**TOWER, "image_size": 32}}
    return prepare_training(with_whole_paths(validate(TrainConfig, {**least, **settings})), cluster)


# -- before it starts ----------------------------------------------------------------------------


def test_a_tower_that_cannot_be_built_is_refused_before_anything_is_read(tmp_path: Path) -> None:
    with pytest.raises(EncoderError, match="timm cannot build no_such_tower"):
        prepared(tmp_path, model={"image_tower": "no_such_tower"})
    assert prepared(tmp_path).done == (0, 0)


def test_weights_are_a_file_wherever_the_worker_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = timm.create_model("test_resnet")
    torch.save(own.state_dict(), tmp_path / "tower.pt")
    monkeypatch.chdir(tmp_path)
    found = prepared(tmp_path, model={**TOWER, "image_size": 32, "weights": "tower.pt"}).config.model.weights
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir("elsewhere")
    ran = worker(config(tmp_path / "out", model={**TOWER, "weights": found}))
    tower = ran.network.matcher.image_tower.state_dict()
    assert all(torch.equal(value, own.state_dict()[name]) for name, value in tower.items())


def test_weights_that_are_not_there_or_of_another_tower_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"model.weights = .*/nowhere.pt: there is no such file"):
        prepared(tmp_path, model={**TOWER, "weights": str(tmp_path / "nowhere.pt")})
    torch.save({"other": torch.zeros(1)}, tmp_path / "other.pt")
    with pytest.raises(ConfigError, match=r"model.weights = .*/other.pt: test_resnet has no weights of these names"):
        prepared(tmp_path, model={**TOWER, "image_size": 32, "weights": str(tmp_path / "other.pt")})
    (tmp_path / "other.pt").write_bytes(b"no state dict")
    with pytest.raises(EncoderError, match="timm cannot build test_resnet"):
        prepared(tmp_path, model={**TOWER, "image_size": 32, "weights": str(tmp_path / "other.pt")})


def test_timms_own_weights_are_no_file(tmp_path: Path) -> None:
    assert prepared(tmp_path, model={**TOWER, "image_size": 32, "weights": "timm"}).config.model.weights == "timm"


def test_a_run_goes_on_in_the_precision_that_it_began_in(tmp_path: Path) -> None:
    run = prepared(tmp_path)
    assert run.config.optim.precision == "fp32"
    run.store.put_atomic(RECORD, json.dumps(run.record).encode())
    on_gpus = Cluster(cpus=4, gpus=1, nodes=1, node_cpus=4, node_gpus=1)
    again = prepared(tmp_path, cluster=on_gpus)
    assert again.config.optim.precision == "fp32" and again.config.workers.gpus_per_worker == 1
    with pytest.raises(PreflightError, match=r"optim\.precision: 'fp32' → 'bf16'"):
        prepared(tmp_path, cluster=on_gpus, optim={"precision": "bf16"})


# -- what Ray is told ----------------------------------------------------------------------------


def test_how_long_nothing_may_move_is_told(tmp_path: Path) -> None:
    context = DataContext.get_current()
    before = context.copy()
    try:
        configure(config(tmp_path, cluster={"no_progress_timeout_s": 123}))
        assert DataContext.get_current().execution_no_progress_timeout_s == 123
    finally:
        DataContext._set_current(before)


@pytest.mark.parametrize(
    ("failures", "decision"),
    [
        ([StorageError("s3://bucket is silent")], FailureDecision.RAISE),
        ([ConnectionError("by the other worker"), EncoderError("no such tower")], FailureDecision.RAISE),
        ([ConnectionError("by the other worker")], FailureDecision.RETRY),
        ([WorkerError("A process of Ray's died")], FailureDecision.RETRY),
    ],
)
def test_what_a_worker_says_is_wrong_is_not_tried_again(failures: list[Exception], decision: FailureDecision) -> None:
    error = WorkerGroupError("told", dict(enumerate(failures)))
    assert OwnErrorsEndIt(FailureConfig(1)).make_decision(error) == decision


def test_the_trainer_leaves_ctrl_c_alone_and_has_its_own_policy(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both by methods of Ray's that are not public, and may be called otherwise one day."""
    told: dict[str, Any] = {}
    assert TorchTrainer._register_sigint_handler is not Trainer._register_sigint_handler
    monkeypatch.setattr(TorchTrainer, "_initialize_and_run_controller", lambda self, **given: told.update(given))
    trainer = Trainer.__new__(Trainer)
    trainer.run_config = type("Run", (), {"failure_config": FailureConfig(2)})()
    trainer._initialize_and_run_controller(failure_policy="Ray's", callbacks=[])
    assert isinstance(told["failure_policy"], OwnErrorsEndIt) and told["callbacks"] == []
    assert told["failure_policy"].failure_config.max_failures == 2


# -- workers -------------------------------------------------------------------------------------


def test_several_workers_step_on_whole_batches_alone(tmp_path: Path) -> None:
    """Two that have 5 and 3 pairs of a batch of 16 have none alike."""
    place = Place(0, 2, torch.device("cpu"), tables_of(examples(5), examples(1)))
    told = task(config(tmp_path, optim={"batch_size": 16}))
    assert list(Feed(told.config, told.matcher, told.survey, place)._own(0)) == []


def test_the_loss_that_is_shown_is_the_one_last_told(tmp_path: Path) -> None:
    shown = TrainProgress(prepared(tmp_path))
    assert [shown._latest(*told) for told in ((0, 0), (1, 3.0), (1, 3.0), (3, 5.0))] == [0, 3.0, 3.0, 1.0]
