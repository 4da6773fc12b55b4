"""A limit on the seconds of training."""

from __future__ import annotations

from lightning.pytorch import Trainer

from app.module import GRPOModule
from callbacks.stages import Stage, StepCallback
from callbacks.upkeep.checkpoint import can_validate, validation_follows
from callbacks.watching.run_ledger import RunLedger
from datamodules.errors import UserError
from datamodules.types import TrainBatch


class ClockBudget(StepCallback):
    """Ends a run after the first validation (without validation: the first step) once it has trained for `seconds`.

    The clock is `time/training` of `RunLedger`, without validation, checkpoints and start-up. `trainer.max_steps` still
    limits the run and determines the learning rate schedule. The run counts as completed.

    Args:
        seconds: seconds of training, above 0.
    """

    stage = Stage.BUDGET

    def __init__(self, seconds: float) -> None:
        if not 0 < seconds < float("inf"):
            raise UserError(f"ClockBudget.seconds is {seconds}, expected a number above 0. Set, for example, 600.")
        self.seconds = seconds

    def setup(self, trainer: Trainer, pl_module: GRPOModule, stage: str) -> None:
        self._ledger = RunLedger.all_of(trainer)[0]

    def on_fit_start(self, trainer: Trainer, pl_module: GRPOModule) -> None:
        # A run that was killed between its last checkpoint and its end has nothing left to do. `trainer.global_step` is
        # not restored yet.
        if self._ledger.steps and self._is_over():
            trainer.should_stop = True

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: GRPOModule, outputs: object, batch: TrainBatch, batch_idx: int
    ) -> None:
        # With an interval of time, a validation follows when the run stops.
        validates = can_validate(trainer) and isinstance(trainer.val_check_batch, int)
        if self._is_over() and (validation_follows(trainer, batch_idx) or not validates):
            trainer.should_stop = True

    def _is_over(self) -> bool:
        return self._ledger.clock.seconds >= self.seconds
