"""Rollout replay: part of every batch comes from a buffer of recent rollouts."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal, get_args

import numpy as np
from lightning.pytorch import Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from app.module import GRPOModule
from callbacks.algorithm.replay_buffer import Draw, ReplayBuffer
from callbacks.stages import Stage, StepCallback
from datamodules.errors import UserError, nearest
from datamodules.group_codec import LogprobDtype
from datamodules.online import OnlinePromptDataModule
from datamodules.seeding import generator
from datamodules.types import TrainBatch

Admit = Literal["informative", "all"]
_CHOICES = {"admit": get_args(Admit), "draw": get_args(Draw), "logprob_dtype": get_args(LogprobDtype)}


class RolloutReplay(StepCallback):
    """Rolls out only a fraction of each batch and completes it with stored groups (arXiv 2506.05316, section 4).

    Groups are drawn before the new ones are stored, and stay in the buffer. While the buffer holds too few groups, more
    fresh prompts are chosen: the batch is never smaller than `data.prompts_per_step`. Stored groups also fill the
    places that `DynamicSampling` could not fill. The objective corrects for the age of replayed tokens by their stored
    behaviour log-probabilities. The age of a group is the number of steps since its generation. Replay begins in step
    2, with what the buffer holds: the paper waits until that is a batch's share, the authors' code until the second
    reference set.

    A prompt that the step has rolled out again loses its stored group, whatever the outcome and even if a filter
    dropped the new group; the step draws such a group only if there are not enough others.

    Args:
        fresh_fraction: fraction of a batch that is rolled out, `delta`, in (0, 1].
        capacity: number of groups that the buffer holds, `C`.
        admit: "informative" stores only groups whose rewards differ (the paper's rule); "all" every group (the
            authors' code).
        max_bytes: memory limit of the stored groups; the oldest are evicted first. null for no limit but the capacity.
        max_age: age limit of replayed groups, in steps; null for no limit.
        draw: "uniform", or "advantage": in proportion to the mean squared advantage, which is p (1 - p) for rewards of
            0 and 1 (`replay_buffer.draw_weight`). Like selection it changes which prompts are trained on, and the loss
            is not reweighted for it.
        logprob_dtype: "float32", or "float16", which takes half the memory and changes the importance ratio of a token
            by a factor of at most exp(|log mu| / 2048).
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
        if not 0 < fresh_fraction <= 1:
            raise UserError(
                f"RolloutReplay.fresh_fraction is {fresh_fraction}, expected a number in (0, 1]. Change it."
            )
        for name, bound in (("capacity", capacity), ("max_bytes", max_bytes), ("max_age", max_age)):
            if bound is not None and bound < 1:
                otherwise = "" if name == "capacity" else ", or set null for no limit"
                raise UserError(f"RolloutReplay.{name} is {bound}, expected at least 1. Raise it{otherwise}.")
        for name, given in (("admit", admit), ("draw", draw), ("logprob_dtype", logprob_dtype)):
            if given not in _CHOICES[name]:
                raise UserError(f"RolloutReplay.{name} is {given!r}; {nearest(str(given), _CHOICES[name])}")
        self.fresh_fraction = fresh_fraction
        self.capacity = capacity
        self.admit = admit
        self.buffer = ReplayBuffer(
            capacity, max_bytes=max_bytes, max_age=max_age, draw_by=draw, logprob_dtype=logprob_dtype
        )
        self._warned = False

    def setup(self, trainer: Trainer, pl_module: GRPOModule, stage: str) -> None:
        self._data = OnlinePromptDataModule.of(trainer)

    def replayed_per_step(self, prompts_per_step: int) -> int:
        """Return the number of groups in a batch that come from a full buffer."""
        return prompts_per_step - max(1, round(self.fresh_fraction * prompts_per_step))

    def on_train_batch_start(self, trainer: Trainer, pl_module: GRPOModule, batch: TrainBatch, batch_idx: int) -> None:
        measured = {group.prompt.id for group, _ in batch.rollouts if len(group.completions)}
        batch.metrics["replay/size"] = float(len(self.buffer))
        batch.metrics["replay/bytes"] = float(self.buffer.nbytes)
        wanted = max(0, self._data.prompts_per_step - len(batch.groups))
        drawn = self.buffer.draw(wanted, generator(self._data.seed, "replay", batch.step), last=measured)
        batch.metrics["replay/dropped_stale"] = float(self.buffer.discard(measured))
        batch.add(dataclasses.replace(group, source="replay") for group in drawn)
        ages = [batch.step - group.birth_step for group in drawn]
        batch.ledger.count("replayed_groups", len(drawn))
        batch.metrics["replay/fraction"] = len(drawn) / max(1, len(batch.groups))
        batch.metrics["replay/age_mean"] = float(np.mean(ages)) if ages else 0.0
        batch.metrics["replay/age_max"] = float(max(ages, default=0))

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: GRPOModule, outputs: object, batch: TrainBatch, batch_idx: int
    ) -> None:
        fresh = [group for group in batch.of("surplus", "trained") if group.source != "replay"]
        everything = self.admit == "all"
        refused = self.buffer.insert(one for one in fresh if (one.completions if everything else one.informative))
        if refused and not self._warned:
            self._warned = True
            rank_zero_warn(
                f"RolloutReplay.max_bytes is {self.buffer.max_bytes}, but the group of prompt {refused[0].prompt.id} "
                f"({refused[0].completion_tokens} tokens) alone is larger than the whole buffer and is not stored. "
                "Raise max_bytes. This warning is shown once."
            )
        # Now, since the number of prompts chosen for the next step depends on the groups that remain.
        batch.metrics["replay/dropped_old"] = float(self.buffer.expire(batch.step + 1))
        self._set_fresh_prompts()

    def _set_fresh_prompts(self) -> None:
        prompts = self._data.prompts_per_step
        self._data.fresh_prompts = prompts - min(self.replayed_per_step(prompts), len(self.buffer))

    def state_dict(self) -> dict[str, Any]:
        return self.buffer.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.buffer.load_state_dict(state_dict, self._data.pools["train"])
        self._set_fresh_prompts()
