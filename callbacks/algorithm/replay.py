"""Rollout replay: part of every batch comes from a buffer of recent rollouts."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal, get_args

import numpy as np
from lightning.pytorch import Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from app.module import GRPOModule
from callbacks.algorithm.replay_buffer import Draw, ReplayBuffer
from callbacks.stages import Stage, StepCallback
from datamodules.errors import UserError, nearest
from datamodules.group_codec import LogprobDtype
from datamodules.seeding import generator
from datamodules.types import RolloutGroup, TrainBatch

Admit = Literal["informative", "all"]
_NAMES = {"admit": get_args(Admit), "draw": get_args(Draw), "logprob_dtype": get_args(LogprobDtype)}


class RolloutReplay(StepCallback):
    """Rolls out only a fraction of each batch and completes it with stored groups (arXiv 2506.05316, section 4).

    The draw comes before the new groups enter, and does not remove what it draws. While the buffer holds too few
    groups, more fresh prompts are chosen: the batch is never smaller than `data.prompts_per_step`. Stored groups also
    take the places that `DynamicSampling` could not fill. The objective corrects for the age of replayed tokens by
    their stored behaviour log-probabilities.

    A prompt that the step has measured anew, whatever the outcome and whether or not a filter dropped the group, loses
    its stored group (`replay/dropped_stale`), which the step itself draws only when there are not enough others. The
    age of a group is the number of steps since its generation: 1 in the step after.

    Metrics: `replay/size` and `replay/bytes` of the buffer that the step draws from, `replay/fraction` of the batch,
    `replay/age_mean` and `_max` of what was drawn, `replay/dropped_stale`, and `replay/dropped_old`: groups that leave
    at the end of the step since they would be older than `max_age` in the next one.

    Args:
        fresh_fraction: share of a batch that is rolled out anew, `delta`.
        capacity: groups that the buffer holds, `C`.
        admit: "informative" lets in groups with differing rewards only (the paper's rule); "all" every group
            (the authors' code).
        max_bytes: memory that the stored groups take, at most; the oldest leave first. null for no bound but the
            capacity.
        max_age: oldest age, in steps, at which a group is replayed; null for no bound.
        draw: "uniform", or "advantage": in proportion to the mean squared advantage, which is p (1 - p) for rewards of
            0 and 1 (`replay_buffer.draw_weight`). Like selection, it changes which prompts are trained on; the loss
            does not weigh them back.
        logprob_dtype: "float32", or "float16", which takes half the memory and moves a token's importance ratio by
            a factor of at most exp(|log mu| / 2048).
    """

    stage = Stage.REPLAY

    def __init__(
        self,
        fresh_fraction: float = 0.5,
        capacity: int = 512,
        admit: Admit = "informative",
        max_bytes: int | None = None,
        max_age: int | None = None,
        draw: Draw = "uniform",
        logprob_dtype: LogprobDtype = "float32",
    ) -> None:
        if not 0 < fresh_fraction <= 1 or capacity < 1:
            raise UserError(
                f"RolloutReplay(fresh_fraction={fresh_fraction}, capacity={capacity}): "
                "expected fresh_fraction in (0, 1] and capacity >= 1"
            )
        for name, bound in (("max_bytes", max_bytes), ("max_age", max_age)):
            if bound is not None and bound < 1:
                raise UserError(f"RolloutReplay({name}={bound}): expected at least 1, or null for no bound")
        for name, given in (("admit", admit), ("draw", draw), ("logprob_dtype", logprob_dtype)):
            if given not in _NAMES[name]:
                raise UserError(f"RolloutReplay({name}={given!r}): {nearest(str(given), _NAMES[name])}")
        self.fresh_fraction = fresh_fraction
        self.capacity = capacity
        self.admit = admit
        self.buffer = ReplayBuffer(
            capacity, max_bytes=max_bytes, max_age=max_age, draw_by=draw, logprob_dtype=logprob_dtype
        )
        self._warned = False

    def setup(self, trainer: Trainer, pl_module: GRPOModule, stage: str) -> None:
        self._datamodule: Any = trainer.datamodule  # type: ignore[attr-defined]

    def replayed_per_step(self, prompts_per_step: int) -> int:
        """Groups of a batch that come from a full buffer."""
        return prompts_per_step - max(1, round(self.fresh_fraction * prompts_per_step))

    def on_train_batch_start(self, trainer: Trainer, pl_module: GRPOModule, batch: TrainBatch, batch_idx: int) -> None:
        measured = {
            group.prompt.id for group in (*batch.groups, *batch.surplus, *batch.dropped) if len(group.completions)
        }
        batch.metrics["replay/size"] = float(len(self.buffer))
        batch.metrics["replay/bytes"] = float(self.buffer.nbytes)
        wanted = max(0, self._datamodule.prompts_per_step - len(batch.groups))
        drawn = self.buffer.draw(wanted, generator(self._datamodule.seed, "replay", batch.step), last=measured)
        batch.metrics["replay/dropped_stale"] = float(self.buffer.discard(measured))
        batch.groups.extend(dataclasses.replace(group, source="replay") for group in drawn)
        ages = [batch.step - group.birth_step for group in drawn]
        batch.ledger.count("replayed_groups", len(drawn))
        batch.metrics["replay/fraction"] = len(drawn) / max(1, len(batch.groups))
        batch.metrics["replay/age_mean"] = float(np.mean(ages)) if ages else 0.0
        batch.metrics["replay/age_max"] = float(max(ages, default=0))

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: GRPOModule, outputs: Any, batch: TrainBatch, batch_idx: int
    ) -> None:
        fresh = [group for group in (*batch.surplus, *batch.groups) if group.source != "replay"]
        refused = self.buffer.insert(group for group in fresh if self._admits(group))
        self._warn_of(refused)
        # Now, not before the next draw: the next step's fresh prompts are counted from what it will find.
        batch.metrics["replay/dropped_old"] = float(self.buffer.expire(batch.step + 1))
        prompts = self._datamodule.prompts_per_step
        self._datamodule.fresh_prompts = prompts - min(self.replayed_per_step(prompts), len(self.buffer))

    def _admits(self, group: RolloutGroup) -> bool:
        return group.informative or (self.admit == "all" and len(group.completions) > 0)

    def _warn_of(self, refused: Sequence[RolloutGroup]) -> None:
        if refused and not self._warned:
            self._warned = True
            rank_zero_warn(
                f"RolloutReplay(max_bytes={self.buffer.max_bytes}): the group of prompt {refused[0].prompt.id} "
                f"({refused[0].completion_tokens} tokens) is larger than the whole buffer and is not kept; raise "
                "max_bytes (said once)"
            )

    def state_dict(self) -> dict[str, Any]:
        return self.buffer.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.buffer.load_state_dict(state_dict, self._datamodule.pools["train"])
