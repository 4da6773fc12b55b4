"""Rollout replay: part of every batch comes from a buffer of recent rollouts."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import numpy as np
from lightning.pytorch import Callback, Trainer

from app.module import GRPOModule
from callbacks.replay_buffer import ReplayBuffer
from datamodules.errors import UserError
from datamodules.seeding import generator
from datamodules.types import TrainBatch


class RolloutReplay(Callback):
    """Rolls out only a fraction of each batch and completes it with stored groups (arXiv 2506.05316, section 4).

    The draw comes before the new groups enter, and does not remove what it draws. While the buffer holds too few
    groups, more fresh prompts are chosen: the batch is never smaller than `data.prompts_per_step`. Stored groups also
    take the places that `DynamicSampling` could not fill. The objective corrects for the age of replayed tokens by
    their stored behaviour log-probabilities.

    Args:
        fresh_fraction: share of a batch that is rolled out anew, `delta`.
        capacity: groups that the buffer holds, `C`.
        admit: "informative" lets in groups with differing rewards only (the paper's rule); "all" every group
            (the authors' code).
    """

    def __init__(
        self, fresh_fraction: float = 0.5, capacity: int = 512, admit: Literal["informative", "all"] = "informative"
    ) -> None:
        if not 0 < fresh_fraction <= 1 or capacity < 1:
            raise UserError(
                f"RolloutReplay(fresh_fraction={fresh_fraction}, capacity={capacity}): "
                "expected fresh_fraction in (0, 1] and capacity >= 1"
            )
        self.fresh_fraction = fresh_fraction
        self.capacity = capacity
        self.admit = admit
        self.buffer = ReplayBuffer(capacity)

    def setup(self, trainer: Trainer, pl_module: GRPOModule, stage: str) -> None:
        self._datamodule: Any = trainer.datamodule  # type: ignore[attr-defined]

    def replayed_per_step(self, prompts_per_step: int) -> int:
        """Groups of a batch that come from a full buffer."""
        return prompts_per_step - max(1, round(self.fresh_fraction * prompts_per_step))

    def on_train_batch_start(self, trainer: Trainer, pl_module: GRPOModule, batch: TrainBatch, batch_idx: int) -> None:
        wanted = max(0, self._datamodule.prompts_per_step - len(batch.groups))
        drawn = self.buffer.draw(wanted, generator(self._datamodule.seed, "replay", batch.step))
        batch.groups.extend(dataclasses.replace(group, source="replay") for group in drawn)
        ages = [batch.step - group.birth_step for group in drawn]
        batch.ledger.count("replayed_groups", len(drawn))
        batch.metrics["replay/fraction"] = len(drawn) / max(1, len(batch.groups))
        batch.metrics["replay/size"] = float(len(self.buffer))
        batch.metrics["replay/age_mean"] = float(np.mean(ages)) if ages else 0.0
        batch.metrics["replay/age_max"] = float(max(ages, default=0))

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: GRPOModule, outputs: Any, batch: TrainBatch, batch_idx: int
    ) -> None:
        fresh = [group for group in (*batch.surplus, *batch.groups) if group.source != "replay"]
        self.buffer.insert(group for group in fresh if self.admit == "all" or group.informative)
        prompts = self._datamodule.prompts_per_step
        self._datamodule.fresh_prompts = prompts - min(self.replayed_per_step(prompts), len(self.buffer))

    def state_dict(self) -> dict[str, Any]:
        return self.buffer.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.buffer.load_state_dict(state_dict, self._datamodule.pools["train"])
