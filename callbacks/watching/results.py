"""What `dots validate`, `test` and `predict` measured, in files and in a few lines at their end."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import Literal

from lightning.pytorch import Trainer

from app.module import GRPOModule
from app.reporting.results_table import results_table
from app.reporting.validation import intervals_over_prompts
from app.runs.folder import run_folder
from callbacks.stages import Stage, StepCallback
from datamodules.ledger import WeightedMean
from datamodules.online import OnlinePromptDataModule
from datamodules.seeding import run_seed
from datamodules.types import TrainBatch

RESULTS = "results.json"
TABLE = "results.md"


class Results(StepCallback):
    """Writes `results.json` to the folder of `dots validate`, `test` or `predict`, and says what was measured.

    The file holds the weights that were measured, the prompts, the sampling, all metrics, and 95% intervals of
    accuracy, pass@k and maj@k by bootstrap over prompts, which the table in `results.md` shows too. The completions are
    in `completions/`.
    """

    stage = Stage.ACCOUNT

    def __init__(self) -> None:
        self._prompts = 0
        self._correct = WeightedMean()
        self._said: list[str] = []

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: GRPOModule,
        outputs: object,
        batch: TrainBatch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        self._prompts += len(batch.prompts)
        for group in batch.groups:
            if group.completions:
                self._correct = self._correct.merge(WeightedMean(group.success_rate, 1.0))

    def on_validation_start(self, trainer: Trainer, pl_module: GRPOModule) -> None:
        self._prompts, self._correct, self._said = 0, WeightedMean(), []

    def on_validation_end(self, trainer: Trainer, pl_module: GRPOModule) -> None:
        assert trainer.state.fn is not None
        command = trainer.state.fn.value
        if command == "fit" or not trainer.is_global_zero:
            return
        folder = run_folder(trainer)
        metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
        if command == "predict":  # for which Lightning has no metrics
            metrics = {"mean_success": self._correct.value}
        weights, data = _weights(trainer, pl_module), OnlinePromptDataModule.of(trainer)
        stage: Literal["val", "test"] = "val" if command == "validate" else "test"
        sets = {} if command == "predict" else pl_module.measured_sets(stage)
        intervals = intervals_over_prompts(stage, sets, run_seed())
        content = {
            "command": command,
            **weights,
            "prompts": self._prompts,
            "sets": {
                name: {
                    # Prompts that were held out were read with the training prompts.
                    "data": str(data.pools[name].report or data.pools["train"].report),
                    "sampling": asdict(pl_module.sampling_of(data.sets[name])),
                }
                for name in data.measured(stage)
            },
            "metrics": {name: value for name, value in sorted(metrics.items()) if math.isfinite(value)},
            "intervals": dict(sorted(intervals.items())),
        }
        folder.mkdir(parents=True, exist_ok=True)
        (folder / RESULTS).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        told = f"mean success {self._correct.value:.3f}" if self._correct.weight else "no completion was scored"
        self._said = [
            f"measured: {weights['weights']}, on {self._prompts:,} prompts: {told}",
            f"results: {folder / RESULTS}",
            f"completions: {folder / 'completions' / f'{command}.parquet'}",
        ]
        if sets:
            table = results_table(stage, list(sets), metrics, intervals)
            (folder / TABLE).write_text(table, encoding="utf-8")
            self._said.insert(0, table)

    def teardown(self, trainer: Trainer, pl_module: GRPOModule, stage: str) -> None:
        for line in self._said:  # after the table that Lightning prints
            print(line, flush=True)
        self._said = []

    # The same for all batches that are only measured; the base class annotates these hooks more narrowly.
    on_test_start = on_predict_start = on_validation_start  # type: ignore[assignment]
    on_test_batch_end = on_predict_batch_end = on_validation_batch_end  # type: ignore[assignment]
    on_test_end = on_predict_end = on_validation_end  # type: ignore[assignment]


def _weights(trainer: Trainer, module: GRPOModule) -> dict[str, str | None]:
    """Return which weights are measured: in words, the policy's path, and the checkpoint's, if one was given."""
    if not trainer.ckpt_path:
        words = f"the policy {module.policy_path} itself, since no --ckpt_path was given"
        return {"weights": words, "policy": module.policy_path, "checkpoint": None}
    checkpoint = Path(trainer.ckpt_path).resolve()  # last.ckpt is a link to the newest
    words = f"the policy {module.policy_path} with the weights of {checkpoint}"
    return {"weights": words, "policy": module.policy_path, "checkpoint": str(checkpoint)}
