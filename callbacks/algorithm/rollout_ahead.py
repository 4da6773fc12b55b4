"""Rollouts ahead of their step: during updates, and in segments that are continued by newer policies."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from lightning.pytorch import Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from app.module import GRPOModule
from app.rollouts.in_flight import InFlight
from app.rollouts.pipeline import Segments
from callbacks.algorithm.dynamic_sampling import count_rollouts
from callbacks.algorithm.prepared_batch import packed, prepared_state, restored_batch, unpacked
from callbacks.algorithm.references import ReferenceRollouts
from callbacks.algorithm.replay import RolloutReplay
from callbacks.stages import Stage, StepCallback
from datamodules.errors import UserError
from datamodules.online import OnlinePromptDataModule
from datamodules.types import Outcomes, TrainBatch


class RolloutAhead(StepCallback):
    """Generates ahead of the step that trains on it: off policy, but no update waits for the longest completion.

    When a step has all its groups, the selector, which has observed the outcomes so far, chooses prompts for the next
    step, and the policy that this step began with generates their completions during the update; with several
    processes each generates its share. A group is as old as its oldest token (`birth_step`), and the objective corrects
    for its age by the behaviour log-probabilities of its tokens, as for replayed groups. Refills of dynamic sampling
    and reference rollouts stay on policy.

    By default the step waits for all completions before the new weights are pushed, so that groups are one step old.
    With `partial_rollout_tokens` (partial rollouts: Kimi k1.5, arXiv 2501.12599) it cuts them instead: every completion
    in flight gets at most so many new tokens in a step, and is continued in the next one by the new policy. The first
    complete groups, in the order in which their prompts were chosen, are trained on; the others wait. While too few are
    complete, the step keeps generating. Cuts depend on token counts alone, so the same seed gives the same run. A group
    is not cut in the last step in which `staleness` permits it. A complete group that no step
    needed in time ages out as a whole: a replay buffer may keep it, and its prompt can be chosen again.

    An engine that generates in the trainer's process cannot overlap rollouts and updates, but can cut.

    Args:
        staleness: maximum age of a group when it is trained on, in steps. 0 rolls out on policy, as without this
            callback. Completions are only cut at 2 or more: at 1 they must end in the step that begins them.
        partial_rollout_tokens: new tokens of a completion in a step; null generates every completion in one piece.
        oversample: prompts in flight and waiting, relative to the prompts that a step trains on, where completions are
            cut. At 2 or less none ages out, unless the number of prompts changes.
    """

    stage = Stage.ROLL_OUT_AHEAD

    def __init__(self, staleness: int = 1, partial_rollout_tokens: int | None = None, oversample: float = 1.5) -> None:
        for name, given, valid, expected in (
            ("staleness", staleness, staleness >= 0, "0 or more steps"),
            (
                "partial_rollout_tokens", partial_rollout_tokens,
                partial_rollout_tokens is None or partial_rollout_tokens >= 1, "at least 1, or null",
            ),
            ("oversample", oversample, 1 <= oversample < math.inf, "at least 1"),
        ):  # fmt: skip
            if not valid:
                raise UserError(f"RolloutAhead.{name} is {given}, expected {expected}. Change it.")
        self.staleness = staleness
        self.partial_rollout_tokens = partial_rollout_tokens
        self.oversample = oversample
        self._flights: list[InFlight] = []
        """In the order of choice, and so the oldest first."""
        self._segments: Segments | None = None
        self._needed = 0

    @property
    def _cuts(self) -> bool:
        return self.staleness > 1 and self.partial_rollout_tokens is not None

    def check(self, trainer: Trainer, module: GRPOModule, datamodule: OnlinePromptDataModule) -> None:
        if self.staleness and module.environment is not None:
            raise UserError(
                "callbacks.RolloutAhead generates completions during the step before, but model.environment is set, "
                "and conversations with an environment are only generated within their own step. Remove "
                "callbacks.RolloutAhead, or set staleness=0."
            )
        if self.staleness and any(one.with_training for one in ReferenceRollouts.all_of(trainer)):
            raise UserError(
                "callbacks.ReferenceRollouts has with_training=true, but callbacks.RolloutAhead rolls out the training "
                "prompts during the step before. Set with_training=false, or remove callbacks.RolloutAhead."
            )

    def setup(self, trainer: Trainer, pl_module: GRPOModule, stage: str) -> None:
        if self.staleness and not self._cuts and not pl_module.engine.runs_ahead:
            raise UserError(
                f"callbacks.RolloutAhead is used with engines.{type(pl_module.engine).__name__}, which generates in "
                "the trainer's process and so not during an update. Use engines.VllmServer, set partial_rollout_tokens "
                "with a staleness of 2 or more to cut long completions, or remove the callback."
            )
        if self.partial_rollout_tokens is not None and not self._cuts:
            rank_zero_warn(
                f"RolloutAhead.partial_rollout_tokens has no effect with a staleness of {self.staleness}: no group may "
                "be older than that, so none can be continued in a later step. Set staleness to 2 or more."
            )
        self._data = OnlinePromptDataModule.of(trainer)

    def on_train_batch_start(self, trainer: Trainer, pl_module: GRPOModule, batch: TrainBatch, batch_idx: int) -> None:
        self._segments = None
        self._age_out(trainer, batch)
        left = sys.maxsize  # steps after this one
        if trainer.max_steps > 0:
            left = -(-(trainer.max_steps - trainer.global_step) // pl_module.mini_batches) - 1
        if ages := [batch.step - group.birth_step for group in batch.groups if group.source == "fresh"]:
            batch.metrics |= {
                "rollout_ahead/age_mean": float(np.mean(ages)),
                "rollout_ahead/age_max": float(max(ages)),
            }
        if not self.staleness or left < 1:
            return
        self._needed = needed = self._data.fresh_prompts
        # What is begun in a run's last steps must still be needed then.
        wanted = min(self.prompts_ahead(needed), needed * left)
        room = len(self._data.pools["train"]) - len(self._flights)
        coming = self._data.prepare(batch.step + 1, max(0, min(wanted - len(self._flights), room)))
        unknown = np.full(len(coming.prompts), np.nan)
        for prompt, expected in zip(
            coming.prompts, unknown if coming.forecast is None else coming.forecast, strict=True
        ):
            generations, explored = pl_module.sampling.num_generations, prompt.id in coming.explored
            self._flights.append(InFlight.begin(prompt, generations, batch.step, float(expected), explored))
        if self._flights:
            self._note_in_flight()
            with coming.ledger.phase("rollout"):
                self._segments = self._start(pl_module, batch.step)

    def prompts_ahead(self, needed: int) -> int:
        """Return the prompts in flight and waiting, where a step trains on `needed` of them."""
        return math.ceil(self.oversample * needed) if self._cuts else needed

    def _start(self, pl_module: GRPOModule, step: int) -> Segments:
        """Start to generate the next segment of all completions in flight, which is the last if it may not be cut."""
        open_ = [one for one in self._flights if one.unfinished(pl_module.sampling)]
        segment, longest = self.partial_rollout_tokens if self._cuts else None, pl_module.sampling.max_completion_length
        limits = [
            longest if segment is None or step + 1 - one.group.birth_step >= self.staleness else segment
            for one in open_
        ]
        return pl_module.pipeline.start(open_, pl_module.sampling, limits, step=step)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: GRPOModule, outputs: object, batch: TrainBatch, batch_idx: int
    ) -> None:
        coming, first = self._data.prepared, self._segments
        if first is None or coming is None:
            return
        pipeline, sampling = pl_module.pipeline, pl_module.sampling
        segments: Segments = first
        while True:
            collected = pipeline.collect(segments, sampling, coming.ledger, step=batch.step)
            grown = {one.group.prompt.id: one for one in collected}
            self._flights = [grown.get(one.group.prompt.id, one) for one in self._flights]
            ended = [one for one in self._flights if not one.unfinished(sampling)]
            if len(ended) >= self._needed or len(ended) == len(self._flights):
                break
            with coming.ledger.phase("rollout"):
                segments = self._start(pl_module, batch.step)
        new = [one for one in ended if not one.scored]
        groups = pipeline.score([one.group for one in new], sampling, coming.ledger, step=batch.step)
        with coming.ledger.phase("select"):
            self._data.selector.observe(Outcomes.of(groups, batch.step, "fresh"))
        scored = {group.prompt.id: group for group in groups}
        self._flights = [
            replace(one, group=scored[one.group.prompt.id], scored=True) if one.group.prompt.id in scored else one
            for one in self._flights
        ]
        taken = [one for one in self._flights if one.scored][: self._needed]
        self._flights = [one for one in self._flights if one not in taken]
        self._note_in_flight()
        _fill(coming, taken)
        waiting = sum(one.scored for one in self._flights)
        batch.metrics |= {
            "time/rollout_overlapped": first.ahead.overlapped,
            "rollout_ahead/in_flight": float(len(self._flights) - waiting),
            "rollout_ahead/waiting": float(waiting),
            "rollout_ahead/continued_tokens": coming.ledger.counts["continued_tokens"],
        }
        batch.ledger.count("overlapped_seconds", first.ahead.overlapped)

    def _age_out(self, trainer: Trainer, batch: TrainBatch) -> None:
        """Give up the groups that are too old for the next step; the complete ones are surplus of this one."""
        old = [one for one in self._flights if batch.step + 1 - one.group.birth_step > self.staleness]
        self._flights = [one for one in self._flights if one not in old]
        self._note_in_flight()
        groups = [one.group for one in old if one.scored]
        batch.add(groups, "surplus")
        if groups and not RolloutReplay.all_of(trainer):
            count_rollouts(batch, "wasted", groups)
        if self.staleness or old:
            batch.ledger.count("aged_out_groups", len(old))
            batch.metrics["rollout_ahead/aged_out"] = float(len(old))

    def _note_in_flight(self) -> None:
        self._data.in_flight = frozenset(one.group.prompt.id for one in self._flights)

    def state_dict(self) -> dict[str, Any]:
        state: dict[str, Any] = {}
        if self._flights:
            state["in_flight"] = {
                **packed([one.group for one in self._flights]),
                "segments": [one.segments for one in self._flights],
                "scored": [one.scored for one in self._flights],
                "forecasts": [one.forecast for one in self._flights],
                "explored": [one.explored for one in self._flights],
            }
        return state | prepared_state(self._data)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        pool = self._data.pools["train"]
        if saved := state_dict.get("in_flight"):
            columns = (saved[name] for name in ("segments", "scored", "forecasts", "explored"))
            self._flights = [InFlight(*one) for one in zip(unpacked(saved, pool), *columns, strict=True)]
            self._note_in_flight()
        if "step" not in state_dict:
            return
        coming = restored_batch(state_dict, self._data)
        # The resumed run may permit less staleness: such prompts are rolled out again when the step begins.
        coming.move([one for one in coming.groups if coming.step - one.birth_step > self.staleness], "surplus")
        self._data.prepared = coming


def _fill(coming: TrainBatch, taken: Sequence[InFlight]) -> None:
    """Make a batch that of the groups taken, in place of the prompts that were chosen for it."""
    forecast = np.array([one.forecast for one in taken])
    coming.prompts, coming.forecast = (), None
    coming.add_prompts([one.group.prompt for one in taken], None if np.isnan(forecast).all() else forecast)
    coming.explored = frozenset(one.group.prompt.id for one in taken if one.explored)
    coming.add([one.group for one in taken])
