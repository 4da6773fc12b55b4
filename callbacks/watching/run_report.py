"""A look into the pool at the end of a run: `prompts.parquet` and `report.html`."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow.parquet as pq
from lightning.pytorch import Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from app.module import GRPOModule
from app.reporting.prompt_history import PromptHistory
from app.reporting.run_page import PROMPTS, write_report
from app.rewards.answers import gold_columns
from app.runs.folder import run_folder
from callbacks.stages import Stage, StepCallback
from datamodules.online import OnlinePromptDataModule
from datamodules.types import TrainBatch


class RunReport(StepCallback):
    """Writes what every prompt has been through, and a page of the run, when the run ends or is stopped.

    Nothing is written after fewer than two steps.
    """

    stage = Stage.ACCOUNT

    def __init__(self) -> None:
        self._history: PromptHistory | None = None
        self._steps = 0

    def setup(self, trainer: Trainer, pl_module: GRPOModule, stage: str) -> None:
        self._data = OnlinePromptDataModule.of(trainer)
        if stage == "fit" and self._history is None:
            self._history = PromptHistory(len(self._data.pools["train"]))

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: GRPOModule, outputs: object, batch: TrainBatch, batch_idx: int
    ) -> None:
        assert self._history is not None
        pool, self._steps = self._data.pools["train"], batch.step + 1
        self._history.choose(pool.positions(prompt.id for prompt in batch.prompts), batch.step)
        measured = [group for group, _ in batch.rollouts if group.source != "replay" and group.completions]
        rates = np.array([group.success_rate for group in measured])
        self._history.measure(pool.positions(group.prompt.id for group in measured), rates)

    def on_fit_end(self, trainer: Trainer, pl_module: GRPOModule) -> None:
        self._write(trainer, pl_module)

    def on_exception(self, trainer: Trainer, pl_module: GRPOModule, exception: BaseException) -> None:
        if trainer.state.fn == "fit":
            self._write(trainer, pl_module)

    def _write(self, trainer: Trainer, pl_module: GRPOModule) -> None:
        if self._history is None or self._steps < 2 or not trainer.is_global_zero:
            return
        folder, golds = run_folder(trainer), gold_columns(pl_module.scorer.rewards)
        try:
            table = self._history.table(self._data.pools["train"], self._data.selector, golds)
            pq.write_table(table, folder / PROMPTS)
            write_report(folder)
        except Exception as error:  # noqa: BLE001  # everything else of the run is saved by now
            rank_zero_warn(
                f"The report of the run cannot be written ({type(error).__name__}: {error}). Everything else is in "
                f"{folder}: dots report {folder} tries again."
            )

    def state_dict(self) -> dict[str, Any]:
        return {} if self._history is None else {"steps": self._steps, **self._history.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if self._history is not None and state_dict:
            self._steps = state_dict["steps"]
            self._history.load_state_dict(state_dict)
