"""Ray Train's trainer, as a command needs it: a signal stops it at once, and an error of our own is told at once."""

from __future__ import annotations

from typing import Any

from ray.train.torch import TorchTrainer
from ray.train.v2._internal.execution.failure_handling import DefaultFailurePolicy, FailureDecision
from ray.train.v2.api.exceptions import TrainingFailedError, WorkerGroupError

from pipelines.errors import VecmillError, WorkerError


class Trainer(TorchTrainer):
    """`fit` ends on the signals of `jobs.signals`, and starts workers again only where that may help."""

    def _register_sigint_handler(self, controller: Any) -> None:
        """Ray's own would take Ctrl-C for itself, and end the process with 0 or 1 and without a word."""

    def _initialize_and_run_controller(self, **told: Any) -> Any:
        policy = OwnErrorsEndIt(self.run_config.failure_config)  # type: ignore[arg-type]
        return super()._initialize_and_run_controller(**{**told, "failure_policy": policy})  # type: ignore[misc]


class OwnErrorsEndIt(DefaultFailurePolicy):
    """Workers that died are started again; those that say what is wrong would say it again."""

    def make_decision(self, training_failed_error: TrainingFailedError) -> FailureDecision:
        if isinstance(training_failed_error, WorkerGroupError):
            failures = training_failed_error.worker_failures.values()
            if any(isinstance(error, VecmillError) and not isinstance(error, WorkerError) for error in failures):
                return FailureDecision.RAISE
        return super().make_decision(training_failed_error)
