"""Validation before the first update, so that every curve has a starting point."""

from __future__ import annotations

from lightning.pytorch import Trainer

from app.module import GRPOModule
from callbacks.stages import Stage, StepCallback


class StartValidation(StepCallback):
    """Runs the validation loop once before the first step of a new run; a resumed run has already done so.

    Args:
        enabled: false leaves it out.
    """

    stage = Stage.VALIDATE

    def __init__(self, enabled: bool = True) -> None:
        self.enabled = enabled

    def on_train_start(self, trainer: Trainer, pl_module: GRPOModule) -> None:
        if not self.enabled or trainer.global_step or not trainer.enable_validation:
            return
        # As Lightning's training loop does around validation within an epoch; there is no public method for it.
        trainer.validating = True
        trainer.fit_loop.epoch_loop.val_loop.run()
        trainer.training = True
