"""When a run is validated: before the first update, at intervals, and after the last update."""

from __future__ import annotations

import math

from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import EarlyStopping

from app.module import GRPOModule
from callbacks.stages import Stage, StepCallback
from callbacks.upkeep.checkpoint import can_validate, is_over
from datamodules.errors import UserError
from datamodules.metric_names import metric_name
from datamodules.types import TrainBatch

_PER_RUN = 10


class StartValidation(StepCallback):
    """Runs the validation loop once before the first step of a new run; a resumed run has already done so.

    Args:
        enabled: false leaves it out.
    """

    stage = Stage.VALIDATE

    def __init__(self, enabled: bool = True) -> None:
        self.enabled = enabled

    def on_train_start(self, trainer: Trainer, pl_module: GRPOModule) -> None:
        if not self.enabled or trainer.global_step or not can_validate(trainer):
            return
        callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]  # set by a connector
        # Early stopping by a metric of steps would find none yet, and end the run.
        trainer.callbacks = [one for one in callbacks if not _monitors_steps(one)]  # type: ignore[attr-defined]
        # As Lightning's training loop does around validation within an epoch; there is no public method for it.
        trainer.validating = True
        trainer.fit_loop.epoch_loop.val_loop.run()
        trainer.training = True
        trainer.callbacks = callbacks  # type: ignore[attr-defined]


def _monitors_steps(callback: Callback) -> bool:
    if not isinstance(callback, EarlyStopping) or callback.monitor.startswith("val/"):
        return False
    return metric_name(callback.monitor) is not None


class EndValidation(StepCallback):
    """Measures the policy with which a run ends, also where its last step is not due for validation.

    Not after Ctrl-C or SIGTERM: such a run is saved to be resumed, as if it had never stopped.
    """

    stage = Stage.VALIDATE

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: GRPOModule, outputs: object, batch: TrainBatch, batch_idx: int
    ) -> None:
        if is_over(trainer):
            trainer.should_stop = True  # Lightning validates before it stops for this reason


def validation_interval(given: int | float | None, max_steps: int, mini_batches: int) -> int:
    """Return the number of steps between two validations.

    Args:
        given: `trainer.val_check_interval`: steps, or a fraction of the run's, since its prompts never end. None for a
            tenth of the run, or 10 steps where they are not limited.
        max_steps: `trainer.max_steps`, the updates of the run.
        mini_batches: updates per step.

    Raises:
        UserError: the interval is 0 or negative, or a fraction of a run without a number of steps.
    """
    if given is None:
        given = 1 / _PER_RUN if max_steps > 0 else _PER_RUN
    if given <= 0:
        raise UserError(
            f"trainer.val_check_interval is {given}, expected a number of steps, a fraction of the run or a time. Set "
            "trainer.limit_val_batches=0 to leave validation out."
        )
    if isinstance(given, int):
        return given
    if given > 1 or max_steps < 1:
        raise UserError(
            f"trainer.val_check_interval is {given}, expected a number of steps, or a fraction up to 1.0 of a run with "
            "trainer.max_steps. Set a number of steps."
        )
    return max(1, round(given * math.ceil(max_steps / mini_batches)))
