"""Comparison of the selector's forecasts with the outcomes of its choices."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from app.module import GRPOModule
from app.reporting.forecast_quality import brier, informative_probability, pearson
from app.reporting.loggers import Media, media_of
from app.reporting.pictures import pixels, reliability_figure, scatter_figure
from callbacks.stages import Stage, StepCallback
from datamodules.errors import UserError
from datamodules.mixture import Mixture
from datamodules.online import OnlinePromptDataModule
from datamodules.types import RolloutGroup, TrainBatch

_MOST_PAIRS = 4096
"""Largest number of forecasts in one picture; the newest are shown."""
_NO_PAIRS = np.empty((0, 2))
_FIRST_WARNING = 10
"""Number of consecutive steps without an informative group before a warning; the next one comes after twice as many."""
_NEARLY_ALL = 0.95


class UniformShare:
    """Mean fraction of informative groups among uniform draws, decaying exponentially because the policy changes."""

    DECAY = 0.9

    def __init__(self) -> None:
        self._informative = 0.0
        self._groups = 0.0

    @property
    def share(self) -> float:
        """The fraction in [0, 1], or NaN before any uniform rollout."""
        return self._informative / self._groups if self._groups else math.nan

    def step(self, informative: Sequence[bool]) -> None:
        """Record whether each uniformly drawn group of a step was informative."""
        self._informative = self.DECAY * self._informative + sum(informative)
        self._groups = self.DECAY * self._groups + len(informative)

    def state_dict(self) -> dict[str, float]:
        return {"informative": self._informative, "groups": self._groups}

    def load_state_dict(self, state: dict[str, float]) -> None:
        self._informative, self._groups = state["informative"], state["groups"]


class UninformativeSteps:
    """Warns about consecutive steps without an informative group, with advice from their outcomes."""

    def __init__(self) -> None:
        self._begin()

    def _begin(self) -> None:
        self._steps = 0
        self._next = _FIRST_WARNING
        self._correct: list[float] = []
        self._truncated: list[float] = []

    def step(self, step: int, groups: Sequence[RolloutGroup]) -> None:
        """Record the groups that a step trains on, and warn when it is time."""
        if any(group.informative for group in groups):
            self._begin()
            return
        self._steps += 1
        self._correct += [float(value) for group in groups for value in group.correctness]
        self._truncated += [float(one.finish_reason == "length") for group in groups for one in group.completions]
        if self._steps >= self._next:
            rank_zero_warn(f"Step {step}: no group of the last {self._steps} steps was informative. {self._advice()}")
            self._next *= 2

    def _advice(self) -> str:
        if not self._correct:
            return "No completion was scored: see the warnings, rewards/failed_fraction and rewards/unscored_fraction."
        correct, truncated = float(np.mean(self._correct)), float(np.mean(self._truncated))
        outcome = (
            f"{correct:.0%} of their completions were correct, {truncated:.0%} were truncated at the length limit: "
        )
        if correct >= _NEARLY_ALL:
            return outcome + "the prompts are too easy for the policy. Use harder ones."
        if correct > 1 - _NEARLY_ALL:
            return outcome + (
                "every prompt is either solved or failed by all completions. Raise model.sampling.num_generations, or "
                "choose prompts between the two (data.selector: datamodules.selectors.Dots)."
            )
        if truncated >= 0.5:
            return outcome + "they end before their answer. Raise model.sampling.max_completion_length."
        return outcome + (
            "the prompts are too hard for the policy, or the reward does not find its answers. Compare "
            "completions/*.parquet with the reference answers, then use easier prompts or fix the reward's options."
        )


class SelectionMonitor(StepCallback):
    """Logs the outcomes of the chosen prompts, and how well they were forecast before the rollouts.

    The metrics `selection/*` (`datamodules.metric_names`) are about all prompts chosen in a step, including those that
    a filter dropped later. A forecast is compared only for prompts whose outcome the selector had not observed; a
    selector that chooses forecasts near 0.5 leaves little to correlate, and `difficulty/reference_pearson` covers the
    whole pool. What a uniform choice would have had is measured in reference sets and explored prompts
    (`UniformShare`), and forecast as the mean of 1 - p^G - (1 - p)^G over the pool, which is too high where the
    forecast is uncertain.

    With several training sources, `train/SOURCE/*` are about the prompts of each.

    Pictures: `selection/reliability` and `selection/forecast_scatter` of the prompts since the last picture, with the
    reference prompts, which cover the whole range, next to the chosen ones.

    Args:
        histograms_every: steps between histograms of the forecast over the pool and of the measured success rates.
        pictures_every: steps between pictures of forecasts and outcomes; 0 draws none.
    """

    stage = Stage.WATCH

    def __init__(self, histograms_every: int = 10, pictures_every: int = 20) -> None:
        if histograms_every < 1 or pictures_every < 0:
            raise UserError(
                f"SelectionMonitor has histograms_every={histograms_every} and pictures_every={pictures_every}, "
                "expected histograms_every >= 1 and pictures_every >= 0. Raise them; pictures_every=0 draws none."
            )
        self.histograms_every = histograms_every
        self.pictures_every = pictures_every
        self._chosen = torch.zeros(0, dtype=torch.bool)
        self._pairs, self._reference_pairs = _NO_PAIRS, _NO_PAIRS
        self._uniform = UniformShare()
        self._uninformative = UninformativeSteps()

    def setup(self, trainer: Trainer, pl_module: GRPOModule, stage: str) -> None:
        self._data = OnlinePromptDataModule.of(trainer)
        if stage == "fit" and not len(self._chosen):
            self._chosen = torch.zeros(len(self._data.pools["train"]), dtype=torch.bool)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: GRPOModule, outputs: object, batch: TrainBatch, batch_idx: int
    ) -> None:
        self._uninformative.step(batch.step, batch.groups)
        groups = chosen_groups(batch)
        pairs = forecast_pairs(batch, groups)
        self._chosen[self._data.pools["train"].positions(group.prompt.id for group in groups)] = True
        batch.metrics["selection/distinct_prompts"] = float(self._chosen.sum())
        batch.metrics["selection/distinct_fraction"] = float(self._chosen.float().mean())
        if groups:
            explored = [group.prompt.id in batch.explored for group in groups]
            batch.metrics |= {
                "selection/mean_success": float(np.mean([group.success_rate for group in groups])),
                "selection/fresh_informative_fraction": float(np.mean([group.informative for group in groups])),
                "selection/explored_fraction": float(np.mean(explored)),
            }
        uniform = [group for group in groups if group.prompt.id in batch.explored and group.source == "fresh"]
        uniform += [group for group, _ in batch.rollouts if group.source == "reference"]
        self._uniform.step([group.informative for group in uniform if group.completions])
        batch.metrics["selection/uniform_informative_measured"] = self._uniform.share
        if batch.pool_forecast is not None:
            chance = informative_probability(batch.pool_forecast, pl_module.sampling.num_generations)
            batch.metrics["selection/uniform_informative_forecast"] = float(chance.mean())
        if len(pairs):
            expected, found = pairs.T
            batch.metrics |= {
                "selection/forecast_mean": float(expected.mean()),
                "selection/forecast_brier": brier(expected, found),
                "selection/forecast_pearson": pearson(expected, found),
            }
        batch.metrics |= self._data.selector.metrics()
        if isinstance(pool := self._data.pools["train"], Mixture):
            batch.metrics |= by_source(batch, groups, pool)
        self._pairs = np.concatenate([self._pairs, pairs])[-_MOST_PAIRS:]
        if batch.reference_forecast is not None:
            self._reference_pairs = np.concatenate([self._reference_pairs, batch.reference_forecast])[-_MOST_PAIRS:]
        media = media_of(trainer)
        if batch.step % self.histograms_every == 0:
            success = np.array([group.success_rate for group in groups])
            shown = {"difficulty/measured_success": success, "difficulty/forecast_success": batch.pool_forecast}
            for one in media:
                for name, values in shown.items():
                    if values is not None and len(values):
                        one.histogram(name, values, batch.step)
        if self.pictures_every > 0 and (batch.step + 1) % self.pictures_every == 0:
            self._add_pictures(media, batch.step)
            self._pairs, self._reference_pairs = _NO_PAIRS, _NO_PAIRS

    def _add_pictures(self, media: Sequence[Media], step: int) -> None:
        if media and len(self._pairs) + len(self._reference_pairs):
            title = f"steps {step + 1 - self.pictures_every} to {step}"
            expected, found = self._pairs.T
            for tag, draw in (("reliability", reliability_figure), ("forecast_scatter", scatter_figure)):
                picture = pixels(draw(expected, found, title, uniform=self._reference_pairs))
                for one in media:
                    one.picture(f"selection/{tag}", picture, step)

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
    """Return the groups of the prompts chosen in this step, whatever their fate, without those that lost all scores."""
    chosen = {prompt.id for prompt in batch.prompts}
    return [
        group
        for group in batch.of("trained", "dropped", "surplus")
        if group.source != "replay" and group.prompt.id in chosen and group.completions
    ]


def by_source(batch: TrainBatch, chosen: list[RolloutGroup], pool: Mixture) -> dict[str, float]:
    """Return the metrics of each source of the training prompts, `train/SOURCE/...`.

    Args:
        batch: a batch that has been trained on.
        chosen: the groups of the prompts chosen in its step.
        pool: the pool.
    """
    found = {}
    for name in pool.parts:
        prompts = [prompt for prompt in batch.prompts if prompt.dataset == name]
        groups = [group for group in chosen if group.prompt.dataset == name]
        rewards = [group.rewards for group in batch.groups if group.prompt.dataset == name and group.completions]
        if batch.prompts:
            found[f"train/{name}/chosen_fraction"] = len(prompts) / len(batch.prompts)
        if rewards:
            found[f"train/{name}/reward"] = float(np.concatenate(rewards).mean())
        if groups:
            found[f"train/{name}/mean_success"] = float(np.mean([group.success_rate for group in groups]))
            found[f"train/{name}/informative_fraction"] = float(np.mean([group.informative for group in groups]))
        if batch.pool_forecast is not None:
            found[f"train/{name}/forecast_mean"] = float(pool.by_part(batch.pool_forecast)[name].mean())
    return found


def forecast_pairs(batch: TrainBatch, groups: list[RolloutGroup]) -> np.ndarray:
    """Return forecast and measured success rate of the fresh groups with a forecast: float64 `[N, 2]`, as chosen."""
    if batch.forecast is None:
        return _NO_PAIRS
    measured = {group.prompt.id: group.success_rate for group in groups if group.source == "fresh"}
    asked = zip(batch.prompts, batch.forecast, strict=True)
    pairs = [(expected, measured[prompt.id]) for prompt, expected in asked if prompt.id in measured]
    found = np.array(pairs, dtype=np.float64).reshape(-1, 2)
    return found[~np.isnan(found[:, 0])]
