"""The progress bar, and one line per validation for logs without a bar."""

from __future__ import annotations

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import RichProgressBar
from lightning.pytorch.utilities.types import STEP_OUTPUT

from app.module import GRPOModule
from callbacks.stages import Stage, StepCallback
from datamodules.types import TrainBatch

_SHOWN = {
    "reward": "reward",
    "selection/informative_fraction": "informative",
    "tokens_per_second": "tok/s",
    "val/accuracy": "val",
}


class RunProgress(StepCallback, RichProgressBar):
    """Shows the steps done, reward, informative fraction, tokens per second and the last validation accuracy."""

    stage = Stage.SHOW_PROGRESS

    def __init__(self) -> None:
        super().__init__()
        self._latest: dict[str, float] = {}

    @property
    def total_train_batches(self) -> int | float:
        steps, module = self.trainer.max_steps, self.trainer.lightning_module
        if steps < 0:
            return float("inf")
        return -(-steps // (module.mini_batches if isinstance(module, GRPOModule) else 1))

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: GRPOModule, outputs: STEP_OUTPUT, batch: TrainBatch, batch_idx: int
    ) -> None:
        self._latest.update(batch.metrics)
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    def on_validation_end(self, trainer: Trainer, pl_module: GRPOModule) -> None:
        super().on_validation_end(trainer, pl_module)
        if trainer.state.fn != "fit":
            self.teardown(trainer, pl_module, "validate")  # the bar ends before what was measured is printed
        if trainer.state.fn != "fit" or not trainer.is_global_zero:
            return
        line = "  ".join(f"{label} {value}" for label, value in self.get_metrics(trainer, pl_module).items())
        of = f"/{trainer.max_steps}" if trainer.max_steps > 0 else ""
        print(f"step {trainer.global_step}{of}  {line}", flush=True)

    def on_test_end(self, trainer: Trainer, pl_module: GRPOModule) -> None:
        super().on_test_end(trainer, pl_module)
        self.teardown(trainer, pl_module, "test")

    def on_predict_end(self, trainer: Trainer, pl_module: GRPOModule) -> None:
        super().on_predict_end(trainer, pl_module)
        self.teardown(trainer, pl_module, "predict")

    def get_metrics(self, trainer: Trainer, pl_module: GRPOModule) -> dict[str, int | str | float | dict[str, float]]:
        values = self._latest | {name: float(value) for name, value in trainer.callback_metrics.items()}
        shown = {label: values[name] for name, label in _SHOWN.items() if name in values}
        return {label: f"{value:.0f}" if value >= 100 else f"{value:.3f}" for label, value in shown.items()}

    def _get_train_description(self, current_epoch: int) -> str:
        return "Training"
