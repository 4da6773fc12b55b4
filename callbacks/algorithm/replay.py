"""Rollout replay: part of every batch comes from a buffer of recent rollouts."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal, get_args

import numpy as np
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn

from app.module import GRPOModule
from callbacks.algorithm.replay_buffer import Draw, ReplayBuffer
from callbacks.algorithm.replay_worth import ENOUGH, PROBE_EVERY, Cost, ReplayWorth
from callbacks.stages import Stage, StepCallback
from datamodules.errors import UserError, nearest
from datamodules.group_codec import LogprobDtype
from datamodules.online import OnlinePromptDataModule
from datamodules.seeding import generator
from datamodules.types import TrainBatch

Admit = Literal["informative", "all"]
Share = Literal["fixed", "auto"]
Places = Literal["reserved", "silent"]
_CHOICES = {
    "admit": get_args(Admit), "draw": get_args(Draw), "logprob_dtype": get_args(LogprobDtype),
    "share": get_args(Share), "places": get_args(Places),
}  # fmt: skip


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

    Replay saves time where a replayed group is worth more than `v* = 1 / (1 + c_g / (y c_u))` of a fresh informative
    one (`c_g`, `c_u`: seconds to generate and to update on a group, `y`: informative share of fresh groups). `dots
    worth` measures this worth for a config.

    Args:
        fresh_fraction: fraction of a batch that is rolled out, `delta`, in (0, 1].
        capacity: number of groups that the buffer holds, `C`.
        admit: "informative" stores only groups whose rewards differ (the paper's rule); "all" every group (the
            authors' code).
        max_bytes: memory limit of the stored groups; the oldest are evicted first. null for no limit but the capacity.
        max_age: age limit of replayed groups, in steps; null for no limit.
        max_uses: number of times that a group is replayed, after which it is removed; null for no limit.
        draw: "uniform"; "advantage": in proportion to the mean squared advantage, which is p (1 - p) for rewards of 0
            and 1 (`replay_buffer.draw_weight`); or "drift": in proportion to `exp(-drift / drift_scale)`, where drift
            is the mean `|log pi - log mu|` of the group's tokens, measured when it was last trained on and carried on
            at the rate that replayed groups have shown. Like selection it changes which prompts are trained on, and
            the loss is not reweighted for it.
        drift_scale: drift in nats per token over which the weight of a group falls to 1/e.
        places: "reserved" rolls out fewer prompts, `fresh_fraction` of them; "silent" rolls out all of them, and
            replayed groups take the places of groups with equal rewards (POPO, arXiv 2606.01281), at most
            `1 - fresh_fraction` of the batch.
        share: "fixed", or "auto": up to `1 - fresh_fraction` while the worth of a replayed group is above the one from
            which replay saves time, by the run's own seconds, and 0 while it is not (`replay_worth.ReplayWorth`). The
            worth is measured by sketches of gradients (`app.objective.sketches`).
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
        max_uses: int | None = None,
        drift_scale: float = 0.1,
        places: Places = "reserved",
        share: Share = "fixed",
    ) -> None:
        if not 0 < fresh_fraction <= 1:
            raise UserError(
                f"RolloutReplay.fresh_fraction is {fresh_fraction}, expected a number in (0, 1]. Change it."
            )
        limits = {"capacity": capacity, "max_bytes": max_bytes, "max_age": max_age, "max_uses": max_uses}
        for name, bound in limits.items():
            if bound is not None and bound < 1:
                otherwise = "" if name == "capacity" else ", or set null for no limit"
                raise UserError(f"RolloutReplay.{name} is {bound}, expected at least 1. Raise it{otherwise}.")
        if not 0 < drift_scale < float("inf"):
            raise UserError(f"RolloutReplay.drift_scale is {drift_scale}, expected a number above 0. Change it.")
        options = {"admit": admit, "draw": draw, "logprob_dtype": logprob_dtype, "share": share, "places": places}
        for name, given in options.items():
            if given not in _CHOICES[name]:
                raise UserError(f"RolloutReplay.{name} is {given!r}; {nearest(str(given), _CHOICES[name])}")
        self.fresh_fraction = fresh_fraction
        self.capacity = capacity
        self.admit = admit
        self.places = places
        self.worth = ReplayWorth() if share == "auto" else None
        self.buffer = ReplayBuffer(
            capacity, max_bytes=max_bytes, max_age=max_age, max_uses=max_uses, draw_by=draw, drift_scale=drift_scale,
            logprob_dtype=logprob_dtype,
        )  # fmt: skip
        self._step = 0  # the next one
        self._told: bool | None = None  # whether the user was last told that replay pays
        self._warned = False

    def setup(self, trainer: Trainer, pl_module: GRPOModule, stage: str) -> None:
        self._data = OnlinePromptDataModule.of(trainer)

    def replayed_per_step(self, prompts_per_step: int) -> int:
        """Return the number of groups in a batch, at most, that come from a full buffer in place of rollouts."""
        return self._most(prompts_per_step) if self.places == "reserved" else 0

    def _most(self, prompts_per_step: int) -> int:
        return prompts_per_step - max(1, round(self.fresh_fraction * prompts_per_step))

    def _wanted(self) -> int:
        """Return the number of groups that the next step replays if the buffer has them."""
        most = self._most(self._data.prompts_per_step)
        return most if self.worth is None else self.worth.groups(most, self._step)

    def on_train_batch_start(self, trainer: Trainer, pl_module: GRPOModule, batch: TrainBatch, batch_idx: int) -> None:
        measured = {group.prompt.id for group, _ in batch.rollouts if len(group.completions)}
        batch.metrics["replay/size"] = float(len(self.buffer))
        batch.metrics["replay/bytes"] = float(self.buffer.nbytes)
        wanted = max(0, self._data.prompts_per_step - len(batch.groups))
        silent = [group for group in batch.groups if not group.informative] if self.places == "silent" else []
        wanted += min(len(silent), max(0, self._wanted() - wanted))
        drawn = self.buffer.draw(wanted, generator(self._data.seed, "replay", batch.step), measured, batch.step)
        batch.move(silent[: max(0, len(batch.groups) + len(drawn) - self._data.prompts_per_step)], "dropped")
        batch.metrics["replay/dropped_stale"] = float(self.buffer.discard(measured))
        batch.add(dataclasses.replace(group, source="replay") for group in drawn)
        if self.worth is not None:
            batch.wants_sketches |= bool(drawn)
        ages = [batch.step - group.birth_step for group in drawn]
        batch.ledger.count("replayed_groups", len(drawn))
        batch.metrics["replay/fraction"] = len(drawn) / max(1, len(batch.groups))
        batch.metrics["replay/age_mean"] = float(np.mean(ages)) if ages else 0.0
        batch.metrics["replay/age_max"] = float(max(ages, default=0))

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: GRPOModule, outputs: object, batch: TrainBatch, batch_idx: int
    ) -> None:
        if batch.drift is not None:
            drifts = {
                group.prompt.id: float(drift)
                for group, drift in zip(batch.groups, batch.drift, strict=True)
                if group.source == "replay" and not np.isnan(drift)
            }
            if drifts:
                self.buffer.measured(drifts, batch.step)
                batch.metrics["replay/drift"] = float(np.mean(list(drifts.values())))
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
        if self.buffer.max_uses is not None:
            batch.metrics["replay/dropped_used"] = float(self.buffer.used_up())
        self._step = batch.step + 1
        if self.worth is not None:
            self._follow(self.worth, pl_module, batch)
        self._set_fresh_prompts()

    def _follow(self, worth: ReplayWorth, pl_module: GRPOModule, batch: TrainBatch) -> None:
        """Set the share of the next steps by the worth of replayed groups, and say when replay begins or ends.

        Collective: the decision must be the same on all ranks, whose clocks differ.
        """
        seconds, counts, surrogate = batch.ledger.seconds, batch.ledger.counts, pl_module.options.surrogate
        reads_silent = bool(surrogate.beta or surrogate.entropy_coef)
        generating = sum(seconds[phase] for phase in ("rollout", "environment", "reference", "reward"))
        slowest = pl_module.ranks.max(torch.tensor([generating, seconds["update"]], dtype=torch.float64))
        everything = batch.of("trained", "surplus", "dropped")
        cost = Cost(
            generating=float(slowest[0]),
            generated=counts["train/prompts"] + counts["reference/prompts"],
            informative=sum(group.informative for group in everything if group.source != "replay"),
            updating=float(slowest[1]),
            updated=sum(reads_silent or group.informative for group in batch.groups),
        )
        worth.observe(batch.sketches, cost, reads_silent=reads_silent)
        (value, error), threshold = worth.worth(), worth.cost().threshold(reads_silent=reads_silent)
        batch.metrics |= {"replay/worth": value, "replay/threshold": threshold, "replay/share": worth.share}
        pays = worth.share > 0
        if worth.measurements >= ENOUGH and pays is not self._told:
            self._told = pays
            then = "groups are replayed" if pays else f"nothing is replayed but a group every {PROBE_EVERY} steps"
            rank_zero_info(
                f"RolloutReplay, step {batch.step}: a replayed group is worth {value:.2f} +- {error:.2f} of a fresh "
                f"one and pays above {threshold:.2f}, so {then}."
            )

    def _set_fresh_prompts(self) -> None:
        prompts = self._data.prompts_per_step
        reserved = min(self._wanted(), len(self.buffer)) if self.places == "reserved" else 0
        self._data.fresh_prompts = prompts - reserved

    def state_dict(self) -> dict[str, Any]:
        state = self.buffer.state_dict()
        if self.worth is not None:
            state |= {"worth": self.worth.state_dict(), "step": self._step, "told": self._told}
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.buffer.load_state_dict(state_dict, self._data.pools["train"])
        if self.worth is not None and "worth" in state_dict:
            self.worth.load_state_dict(state_dict["worth"])
            self._step, self._told = state_dict["step"], state_dict["told"]
        self._set_fresh_prompts()
