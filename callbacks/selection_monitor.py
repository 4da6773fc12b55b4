"""Shows what the selector expected, what happened, and what it knows."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.loggers import TensorBoardLogger

from app.module import GRPOModule
from app.stats import brier, pearson
from datamodules.types import TrainBatch


class SelectionMonitor(Callback):
    """Logs how the prompts chosen turned out, against the forecast made before they were rolled out.

    Args:
        histograms_every: steps between histograms of the forecast over the pool and of the success measured.
    """

    def __init__(self, histograms_every: int = 10) -> None:
        self.histograms_every = histograms_every
        self._rolled_out = torch.zeros(0, dtype=torch.bool)

    def setup(self, trainer: Trainer, pl_module: GRPOModule, stage: str) -> None:
        self._datamodule: Any = trainer.datamodule  # type: ignore[attr-defined]
        if stage == "fit" and not len(self._rolled_out):
            self._rolled_out = torch.zeros(len(self._datamodule.pools["train"]), dtype=torch.bool)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: GRPOModule, outputs: Any, batch: TrainBatch, batch_idx: int
    ) -> None:
        pool, selector = self._datamodule.pools["train"], self._datamodule.selector
        fresh = {group.prompt.id: group for group in batch.groups if group.source != "replay" and group.completions}
        self._rolled_out[pool.positions(fresh)] = True
        success = np.array([group.success_rate for group in fresh.values()])
        metrics = {"selection/distinct_fraction": float(self._rolled_out.float().mean())}
        if len(success):
            metrics["selection/mean_success"] = float(success.mean())
            metrics["selection/fresh_informative_fraction"] = float(
                np.mean([group.informative for group in fresh.values()])
            )
        metrics |= _forecast_metrics(batch, {name: group.success_rate for name, group in fresh.items()})
        batch.metrics |= metrics | selector.metrics()
        if batch.step % self.histograms_every == 0:
            self._histograms(trainer, batch.step, success, selector.forecast())

    def _histograms(self, trainer: Trainer, step: int, success: np.ndarray, forecast: np.ndarray | None) -> None:
        for logger in trainer.loggers:
            if not isinstance(logger, TensorBoardLogger):
                continue
            if len(success):
                logger.experiment.add_histogram("difficulty/measured_success", success, step)
            if forecast is not None:
                logger.experiment.add_histogram("difficulty/forecast_success", forecast, step)

    def state_dict(self) -> dict[str, Any]:
        return {"rolled_out": self._rolled_out}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._rolled_out = state_dict["rolled_out"]


def _forecast_metrics(batch: TrainBatch, measured: dict[str, float]) -> dict[str, float]:
    if batch.forecast is None:
        return {}
    pairs = [
        (expected, measured[prompt.id])
        for prompt, expected in zip(batch.prompts, batch.forecast, strict=True)
        if prompt.id in measured
    ]
    if not pairs:
        return {}
    expected, found = np.array(pairs).T
    metrics = {"selection/forecast_mean": float(expected.mean()), "selection/forecast_brier": brier(expected, found)}
    return metrics | {"selection/forecast_pearson": pearson(expected, found)}
