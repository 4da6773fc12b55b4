"""The run's folder, known to all ranks and named where the user sees it."""

from __future__ import annotations

from pathlib import Path

from lightning.pytorch import Trainer

from app.module import GRPOModule
from app.reporting.loggers import media_of
from app.runs.folder import RunTrainer
from callbacks.stages import Stage, StepCallback


class RunFolder(StepCallback):
    """Tells the other ranks of the run's folder and prints it at the start and at the end."""

    stage = Stage.PUSH_WEIGHTS

    def setup(self, trainer: RunTrainer, pl_module: GRPOModule, stage: str) -> None:
        if run := trainer.strategy.broadcast(str(trainer.run or "")):
            trainer.run = Path(run)
            self._print(trainer)

    def on_train_start(self, trainer: Trainer, pl_module: GRPOModule) -> None:
        for one in media_of(trainer):
            one.resume(trainer.fit_loop.epoch_loop.total_batch_idx + 1)

    def on_exception(self, trainer: RunTrainer, pl_module: GRPOModule, exception: BaseException) -> None:
        if trainer.begun:  # else the folder is removed
            self._print(trainer)

    def teardown(self, trainer: RunTrainer, pl_module: GRPOModule, stage: str) -> None:
        self._print(trainer)

    def _print(self, trainer: RunTrainer) -> None:
        if trainer.is_global_zero and trainer.run is not None:
            print(f"run folder: {trainer.run}", flush=True)
