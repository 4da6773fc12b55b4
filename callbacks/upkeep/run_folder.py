"""The run's folder, known to all ranks and named where the user sees it."""

from __future__ import annotations

from pathlib import Path

from lightning.pytorch import Trainer

from app.module import GRPOModule
from app.reporting.loggers import media_of
from app.runs.folder import RunTrainer
from callbacks.stages import Stage, StepCallback


class RunFolder(StepCallback):
    """Tells the other ranks of the run's folder and prints it at the start; the trainer prints it at the end."""

    stage = Stage.PUSH_WEIGHTS

    def setup(self, trainer: RunTrainer, pl_module: GRPOModule, stage: str) -> None:
        if run := trainer.strategy.broadcast(str(trainer.run or "")):
            trainer.run = Path(run)
            if trainer.is_global_zero:
                print(f"run folder: {run}", flush=True)

    def on_train_start(self, trainer: Trainer, pl_module: GRPOModule) -> None:
        for one in media_of(trainer):
            one.resume(trainer.fit_loop.epoch_loop.total_batch_idx + 1)
