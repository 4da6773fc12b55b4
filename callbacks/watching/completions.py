"""Logs of completions: a few in the loggers, all of a step in a parquet file."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from lightning.pytorch import Trainer

from app.module import GRPOModule
from app.reporting.completions import Row, rows_of, shown_rows, write_rows
from app.reporting.loggers import media_of
from app.rewards.answers import gold_columns
from app.runs.folder import run_folder
from callbacks.stages import Stage, StepCallback
from datamodules.errors import UserError
from datamodules.types import RolloutGroup, TrainBatch


class CompletionsLog(StepCallback):
    """Writes the completions of a step to `completions/step_*.parquet`, and a few of them to the loggers.

    A file contains all completions that its step trained on and, without `advantage`, those of groups that a filter
    dropped or the batch had no place for. Further columns are the reference answer (`answer`), the part of the data
    that the prompt is from (`task`), the success rate that the selector expected (`forecast`), the data's own columns,
    what reward functions give to `log_extra`, and the messages of conversations with an environment (`turns`, as JSON).
    Validations within a run leave `completions/val_*.parquet`, and `dots validate`, `test` and `predict` a file of
    their name; those of a named set are in a folder of its name.

    Args:
        every: steps between two files.
        samples: number of completions shown in the loggers each time, wrong ones first.
    """

    stage = Stage.WATCH

    def __init__(self, every: int = 10, samples: int = 4) -> None:
        if every < 1 or samples < 0:
            raise UserError(
                f"CompletionsLog has every={every} and samples={samples}, expected at least 1 and 0. Raise them."
            )
        self.every = every
        self.samples = samples
        self._measured: dict[str, list[Row]] = {}

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: GRPOModule, outputs: object, batch: TrainBatch, batch_idx: int
    ) -> None:
        if batch.step % self.every or not trainer.is_global_zero:
            return
        untrained = [*batch.of("dropped"), *(group for group in batch.of("surplus") if group.source == "fresh")]
        forecast = (
            {} if batch.forecast is None else dict(zip((p.id for p in batch.prompts), batch.forecast, strict=True))
        )
        trained = self._rows(pl_module, batch.groups, batch.step, batch.advantages, forecast)
        rows = [*trained, *self._rows(pl_module, untrained, batch.step, forecast=forecast)]
        write_rows(run_folder(trainer) / "completions" / f"step_{batch.step:08d}.parquet", rows)
        self._show(trainer, "completions/train", trained, batch.step)

    def on_validation_start(self, trainer: Trainer, pl_module: GRPOModule) -> None:
        self._measured = {}

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: GRPOModule,
        outputs: object,
        batch: TrainBatch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if trainer.is_global_zero:
            name = pl_module.measured_set(dataloader_idx).partition("/")[2]  # empty where there is one set only
            self._measured.setdefault(name, []).extend(self._rows(pl_module, batch.groups, _steps(trainer)))

    def on_validation_end(self, trainer: Trainer, pl_module: GRPOModule) -> None:
        assert trainer.state.fn is not None
        command, steps = trainer.state.fn.value, _steps(trainer)
        file = f"val_{steps:08d}" if command == "fit" else command
        tag = "completions/test" if command == "test" else "completions/val"
        for name, rows in self._measured.items():
            write_rows(run_folder(trainer) / "completions" / name / f"{file}.parquet", rows)
            self._show(trainer, f"{tag}/{name}" if name else tag, rows, steps)
        self._measured = {}

    # The same for all batches that are only measured; the base class annotates these hooks more narrowly.
    on_test_start = on_predict_start = on_validation_start  # type: ignore[assignment]
    on_test_batch_end = on_predict_batch_end = on_validation_batch_end  # type: ignore[assignment]
    on_test_end = on_predict_end = on_validation_end  # type: ignore[assignment]

    def _rows(
        self,
        module: GRPOModule,
        groups: Sequence[RolloutGroup],
        step: int,
        advantages: Sequence[np.ndarray] = (),
        forecast: dict[str, float] | None = None,
    ) -> list[Row]:
        def decode(ids: np.ndarray) -> str:
            return str(module.tokenizer.decode(ids.tolist()))

        return list(rows_of(groups, step, gold_columns(module.scorer.rewards), advantages, forecast or {}, decode))

    def _show(self, trainer: Trainer, name: str, rows: Sequence[Row], step: int) -> None:
        shown = shown_rows(rows, self.samples)
        for one in media_of(trainer) if shown else ():
            one.table(name, shown, step)


def _steps(trainer: Trainer) -> int:
    """Return the steps that the measured policy has seen in this run; 0 outside of a training."""
    return trainer.fit_loop.epoch_loop.total_batch_idx + 1 if trainer.state.fn == "fit" else 0
