"""Ends a run when it has trained for so many seconds."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Callback, Trainer

from app.module import GRPOModule
from callbacks.stages import Stage, StepCallback
from callbacks.upkeep.checkpoint import validation_follows
from callbacks.watching.run_ledger import RunLedger
from datamodules.errors import UserError
from datamodules.types import TrainBatch


class ClockBudget(StepCallback):
    """Stops at the first validation, or step where there is none, at which the training clock has passed `seconds`.

    The clock is that of `RunLedger` (`time/training`): without validation, checkpoints and start-up.
    `trainer.max_steps` still bounds the run, and schedules of the learning rate go by it. The run counts as completed.

    Args:
        seconds: of training, above 0.
    """

    stage = Stage.BUDGET

    def __init__(self, seconds: float) -> None:
        if not 0 < seconds < float("inf"):
            raise UserError(f"ClockBudget(seconds={seconds}): expected a number of seconds above 0, e.g. 600")
        self.seconds = seconds

    def setup(self, trainer: Trainer, pl_module: GRPOModule, stage: str) -> None:
        callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]  # set by a connector
        self._ledger = next(one for one in callbacks if isinstance(one, RunLedger))  # a standard callback

    def on_fit_start(self, trainer: Trainer, pl_module: GRPOModule) -> None:
        # A run that was killed between its last checkpoint and its end has nothing left to do. The trainer's own steps
        # are restored later than the callbacks'.
        if self._ledger.steps and self._is_over():
            trainer.should_stop = True

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: GRPOModule, outputs: Any, batch: TrainBatch, batch_idx: int
    ) -> None:
        if self._is_over() and (validation_follows(trainer, batch_idx) or not _is_validated(trainer)):
            trainer.should_stop = True

    def _is_over(self) -> bool:
        return self._ledger.clock.seconds >= self.seconds


def _is_validated(trainer: Trainer) -> bool:
    """Whether the run is validated on its way, not just at the end of an epoch that never ends."""
    interval = trainer.val_check_batch
    return bool(trainer.enable_validation and isinstance(interval, int) and interval < trainer.num_training_batches)
