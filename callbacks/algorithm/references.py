"""Periodic rollouts of a uniform reference set, from which the difficulty of all other prompts is predicted."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch
from lightning.pytorch import Trainer

from app.module import GRPOModule
from app.reporting.forecast_quality import brier, pearson
from app.rollouts.pipeline import RolloutRequest
from callbacks.stages import Stage, StepCallback
from datamodules.errors import UserError
from datamodules.group_codec import pack_groups, unpack_groups
from datamodules.ledger import Ledger
from datamodules.online import OnlinePromptDataModule
from datamodules.types import Outcomes, Prompt, RolloutGroup, TrainBatch


class ReferenceRollouts(StepCallback):
    """Rolls out `size` prompts with the new policy every `every` steps, and shows the selector their success rates.

    The code of DOTS (arXiv 2506.05316) discards these rollouts; its paper (appendix A.1) trains on those whose forecast
    is near the target. Because they are on policy, by default a reference prompt that the selector chooses for the very
    next step is trained on without another rollout, and the other informative groups are offered to the replay buffer.
    The selector has chosen such a prompt by the outcome of the same group, so its estimate is conditioned on that
    outcome, as in any dynamic sampling.

    Args:
        size: number of reference prompts, `K`.
        every: steps between two reference sets, `mu`.
        reuse: "train" as above; "buffer" only offers the groups to the replay buffer; "discard" as in the code of DOTS.
        with_training: whether the reference set is rolled out in one call of the engine with the training prompts of a
            step, which so waits for one longest completion instead of two. The selector sees the set after the choice
            of that step instead of before it. A prompt that is in both is rolled out once, for training. The first set
            still precedes the first choice.
    """

    stage = Stage.ROLL_OUT_REFERENCES

    def __init__(
        self,
        size: int = 256,
        every: int = 2,
        reuse: Literal["train", "buffer", "discard"] = "train",
        with_training: bool = False,
    ) -> None:
        if size < 2 or every < 1:
            raise UserError(
                f"ReferenceRollouts has size={size} and every={every}, expected size >= 2 and every >= 1. Raise them."
            )
        self.size = size
        self.every = every
        self.reuse = reuse
        self.with_training = with_training
        self._groups: list[RolloutGroup] = []
        self._before_first = Ledger()
        self._restored = False
        self._metrics: dict[str, float] = {}
        self._forecast: np.ndarray | None = None

    def setup(self, trainer: Trainer, pl_module: GRPOModule, stage: str) -> None:
        self._data = OnlinePromptDataModule.of(trainer)

    def on_train_start(self, trainer: Trainer, pl_module: GRPOModule) -> None:
        if not self._restored:
            # A run that resumes without having measured references begins with them now.
            self._measure(pl_module, self._before_first, step=trainer.fit_loop.epoch_loop.total_batch_idx + 1)

    def on_train_batch_start(self, trainer: Trainer, pl_module: GRPOModule, batch: TrainBatch, batch_idx: int) -> None:
        batch.ledger.add(self._before_first)
        if self.with_training and not self._groups and batch.step % self.every == 0:
            last = trainer.global_step + pl_module.mini_batches >= trainer.max_steps > 0
            if not last:
                self._measure_with(pl_module, batch)
        batch.metrics.update(self._metrics)
        batch.reference_forecast = self._forecast
        self._before_first, self._metrics, self._forecast = Ledger(), {}, None
        offered, self._groups = self._groups, []
        if self.reuse == "discard":
            return
        # A prompt that was rolled out ahead of the step already has its group.
        chosen = {prompt.id for prompt in batch.prompts} - {group.prompt.id for group in batch.groups}
        for group in offered:
            batch.add([group], "trained" if self.reuse == "train" and group.prompt.id in chosen else "surplus")

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: GRPOModule, outputs: object, batch: TrainBatch, batch_idx: int
    ) -> None:
        step = batch.step + 1
        if not self.with_training and step % self.every == 0 and not trainer.global_step >= trainer.max_steps > 0:
            self._measure(pl_module, batch.ledger, step)

    def _measure(self, pl_module: GRPOModule, ledger: Ledger, step: int) -> None:
        """Roll out a reference set in a call of its own."""
        self._groups = pl_module.pipeline.roll(
            self._choose(), pl_module.sampling, ledger, purpose="reference", step=step, source="reference"
        )
        self._show(self._groups, ledger, step)

    def _measure_with(self, pl_module: GRPOModule, batch: TrainBatch) -> None:
        """Roll out a reference set together with the prompts of a step, and add the groups of these to it."""
        chosen, references = {prompt.id for prompt in batch.prompts}, self._choose()
        others = [prompt for prompt in references if prompt.id not in chosen]
        requests = [RolloutRequest(batch.prompts, "train"), RolloutRequest(others, "reference", "reference")]
        trained, self._groups = pl_module.pipeline.roll_together(
            requests, pl_module.sampling, batch.ledger, step=batch.step
        )
        group_of = {group.prompt.id: group for group in (*trained, *self._groups)}
        self._show([group_of[prompt.id] for prompt in references], batch.ledger, batch.step)
        measured = {prompt.id for prompt in references}
        with batch.ledger.phase("select"):
            fresh = [group for group in trained if group.prompt.id not in measured]
            self._data.selector.observe(Outcomes.of(fresh, batch.step, "fresh"))
        batch.add(trained)

    def _choose(self) -> list[Prompt]:
        pool = self._data.pools["train"]
        return [pool[position] for position in pool.positions(self._data.selector.choose_references(self.size))]

    def _show(self, groups: Sequence[RolloutGroup], ledger: Ledger, step: int) -> None:
        """Show the selector a reference set, and note how well it was forecast."""
        selector, pool = self._data.selector, self._data.pools["train"]
        outcomes = Outcomes.of(groups, step, "reference")
        with ledger.phase("reference"):
            # A uniform draw, so these are unbiased estimates for the whole pool.
            self._metrics = {
                "difficulty/reference_success": float(np.mean(outcomes.success_rate)),
                "difficulty/reference_informative_fraction": float(np.mean(outcomes.reward_std > 0)),
            }
            forecast = selector.forecast()
            if forecast is not None:
                expected = forecast[pool.positions(outcomes.prompt_ids)]
                self._forecast = np.stack([expected, outcomes.success_rate], axis=1)
                self._metrics["difficulty/reference_pearson"] = pearson(*self._forecast.T)
                self._metrics["difficulty/reference_brier"] = brier(*self._forecast.T)
            selector.observe(outcomes)

    def state_dict(self) -> dict[str, Any]:
        forecast = None if self._forecast is None else torch.from_numpy(self._forecast.copy())
        return {"groups": pack_groups(self._groups), "metrics": dict(self._metrics), "forecast": forecast}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._groups = unpack_groups(state_dict["groups"], self._data.pools["train"])
        self._metrics = state_dict["metrics"]
        self._forecast = None if state_dict["forecast"] is None else state_dict["forecast"].numpy()
        self._restored = True
