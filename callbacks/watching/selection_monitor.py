"""Shows what the selector expected, what happened, and what it knows."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from torch.utils.tensorboard import SummaryWriter

from app.module import GRPOModule
from app.reporting.forecast_quality import brier, informative_probability, pearson
from app.reporting.pictures import pixels, reliability_figure, scatter_figure
from callbacks.stages import Stage, StepCallback
from callbacks.watching.uniform_share import UniformShare
from callbacks.watching.uninformative import UninformativeSteps
from datamodules.errors import UserError
from datamodules.types import RolloutGroup, TrainBatch

_MOST_PAIRS = 4096
"""Forecasts in one picture, at most: the newest."""
_NO_PAIRS = np.empty((0, 2))


class SelectionMonitor(StepCallback):
    """Logs how the prompts chosen turned out, against the forecast made before they were rolled out.

    All of these are about the prompts chosen in a step, those that a filter dropped afterwards included:

    - `selection/mean_success`, `selection/fresh_informative_fraction`: what their groups showed.
    - `selection/forecast_mean`, `_brier`, `_pearson`: the forecast made before their rollouts, against these. Prompts
      whose groups come from a reference set are left out, since the selector had seen them. A selector that picks
      forecasts near 0.5 leaves little to correlate with; `difficulty/reference_pearson` is the view of the whole pool.
    - `selection/uniform_informative_measured`: what a uniform choice would have given in place of
      `fresh_informative_fraction`, estimated from uniform rollouts: reference sets and prompts drawn for exploration
      (see `UniformShare`). Only in runs that have any.
    - `selection/uniform_informative_forecast`: the same, from the forecast: the mean of 1 - p^G - (1 - p)^G over the
      pool. Too high where the forecast is unsure, because p is then a mean over both extremes.
    - `selection/explored_fraction`: share drawn uniformly for exploration.
    - `selection/distinct_prompts`, `selection/distinct_fraction`: different prompts chosen so far, and their share of
      the pool.

    Pictures: `selection/reliability` and `selection/forecast_scatter`, over the prompts since the last ones; reference
    prompts, a uniform draw that shows the whole range, are drawn beside the chosen ones.

    Args:
        histograms_every: steps between histograms of the forecast over the pool and of the success measured.
        pictures_every: steps between pictures of the forecast against the outcome; 0 draws none.
    """

    stage = Stage.WATCH

    def __init__(self, histograms_every: int = 10, pictures_every: int = 20) -> None:
        if histograms_every < 1 or pictures_every < 0:
            raise UserError(
                f"SelectionMonitor(histograms_every={histograms_every}, pictures_every={pictures_every}): "
                "expected histograms_every >= 1 and pictures_every >= 0 (0 draws none)"
            )
        self.histograms_every = histograms_every
        self.pictures_every = pictures_every
        self._chosen = torch.zeros(0, dtype=torch.bool)
        self._pairs, self._reference_pairs = _NO_PAIRS, _NO_PAIRS
        self._uniform = UniformShare()
        self._uninformative = UninformativeSteps()

    def setup(self, trainer: Trainer, pl_module: GRPOModule, stage: str) -> None:
        self._datamodule: Any = trainer.datamodule  # type: ignore[attr-defined]
        if stage == "fit" and not len(self._chosen):
            self._chosen = torch.zeros(len(self._datamodule.pools["train"]), dtype=torch.bool)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: GRPOModule, outputs: Any, batch: TrainBatch, batch_idx: int
    ) -> None:
        self._uninformative.step(batch.step, batch.groups)
        groups = chosen_groups(batch)
        pairs = forecast_pairs(batch, groups)
        batch.metrics |= self._chosen_metrics(groups, batch.explored)
        batch.metrics |= self._uniform_metrics(batch, groups, pl_module.sampling.num_generations)
        batch.metrics |= _forecast_metrics(pairs)
        batch.metrics |= self._datamodule.selector.metrics()
        self._pairs = np.concatenate([self._pairs, pairs])[-_MOST_PAIRS:]
        if batch.reference_forecast is not None:
            self._reference_pairs = np.concatenate([self._reference_pairs, batch.reference_forecast])[-_MOST_PAIRS:]
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                self._show(logger.experiment, batch, groups)
        if self._pictures_due(batch.step):
            self._pairs, self._reference_pairs = _NO_PAIRS, _NO_PAIRS

    def _chosen_metrics(self, groups: list[RolloutGroup], explored: frozenset[str]) -> dict[str, float]:
        self._chosen[self._datamodule.pools["train"].positions(group.prompt.id for group in groups)] = True
        metrics = {
            "selection/distinct_prompts": float(self._chosen.sum()),
            "selection/distinct_fraction": float(self._chosen.float().mean()),
        }
        if groups:
            metrics["selection/mean_success"] = float(np.mean([group.success_rate for group in groups]))
            metrics["selection/fresh_informative_fraction"] = float(np.mean([group.informative for group in groups]))
            metrics["selection/explored_fraction"] = float(np.mean([group.prompt.id in explored for group in groups]))
        return metrics

    def _uniform_metrics(self, batch: TrainBatch, groups: list[RolloutGroup], samples: int) -> dict[str, float]:
        drawn = [group for group in groups if group.prompt.id in batch.explored and group.source == "fresh"]
        references = [group for group in (*batch.groups, *batch.dropped, *batch.surplus) if group.source == "reference"]
        self._uniform.step([group.informative for group in (*drawn, *references) if group.completions])
        metrics = {"selection/uniform_informative_measured": self._uniform.share}
        if batch.pool_forecast is not None:
            metrics["selection/uniform_informative_forecast"] = float(
                informative_probability(batch.pool_forecast, samples).mean()
            )
        return metrics

    def _show(self, writer: SummaryWriter, batch: TrainBatch, groups: list[RolloutGroup]) -> None:
        if batch.step % self.histograms_every == 0:
            if groups:
                success = np.array([group.success_rate for group in groups])
                writer.add_histogram("difficulty/measured_success", success, batch.step)
            if batch.pool_forecast is not None:
                writer.add_histogram("difficulty/forecast_success", batch.pool_forecast, batch.step)
        if self._pictures_due(batch.step) and len(self._pairs) + len(self._reference_pairs):
            title = f"steps {batch.step + 1 - self.pictures_every} to {batch.step}"
            expected, found = self._pairs.T
            for tag, draw in (("reliability", reliability_figure), ("forecast_scatter", scatter_figure)):
                picture = pixels(draw(expected, found, title, uniform=self._reference_pairs))
                writer.add_image(f"selection/{tag}", picture, batch.step, dataformats="HWC")

    def _pictures_due(self, step: int) -> bool:
        return self.pictures_every > 0 and (step + 1) % self.pictures_every == 0

    def state_dict(self) -> dict[str, Any]:
        return {
            "chosen": self._chosen,
            "pairs": torch.from_numpy(self._pairs.copy()),
            "reference_pairs": torch.from_numpy(self._reference_pairs.copy()),
            "uniform": self._uniform.state_dict(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._chosen = state_dict["chosen"]
        self._pairs = state_dict["pairs"].numpy().copy()
        self._reference_pairs = state_dict["reference_pairs"].numpy().copy()
        self._uniform.load_state_dict(state_dict["uniform"])


def chosen_groups(batch: TrainBatch) -> list[RolloutGroup]:
    """The groups of the prompts chosen in this step, whatever became of them; one that lost all scores is left out."""
    chosen = {prompt.id for prompt in batch.prompts}
    return [
        group
        for group in (*batch.groups, *batch.dropped, *batch.surplus)
        if group.source != "replay" and group.prompt.id in chosen and group.completions
    ]


def forecast_pairs(batch: TrainBatch, groups: list[RolloutGroup]) -> np.ndarray:
    """float64 `[N, 2]`: forecast and measured success of the fresh groups that had a forecast, in order of choice."""
    if batch.forecast is None:
        return _NO_PAIRS
    measured = {group.prompt.id: group.success_rate for group in groups if group.source == "fresh"}
    asked = zip(batch.prompts, batch.forecast, strict=True)
    pairs = [(expected, measured[prompt.id]) for prompt, expected in asked if prompt.id in measured]
    found = np.array(pairs, dtype=np.float64).reshape(-1, 2)
    return found[~np.isnan(found[:, 0])]


def _forecast_metrics(pairs: np.ndarray) -> dict[str, float]:
    if not len(pairs):
        return {}
    expected, found = pairs.T
    return {
        "selection/forecast_mean": float(expected.mean()),
        "selection/forecast_brier": brier(expected, found),
        "selection/forecast_pearson": pearson(expected, found),
    }
