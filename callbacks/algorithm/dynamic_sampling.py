"""Dynamic sampling: drop the groups that teach nothing and roll out others until the batch is full."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lightning.pytorch import Callback, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from app.module import GRPOModule
from callbacks.algorithm.references import ReferenceRollouts
from callbacks.algorithm.replay import RolloutReplay
from callbacks.algorithm.rollouts import roll_fresh
from callbacks.stages import Stage, StepCallback
from datamodules.errors import UserError
from datamodules.types import REWARD_TOLERANCE, Prompt, RolloutGroup, TrainBatch


class DynamicSampling(StepCallback):
    """Drops groups with equal correctness rewards and refills the batch, whatever the selector.

    DAPO (Yu et al. 2025, arXiv 2503.14476, section 3.2) keeps sampling until the batch holds only prompts with
    0 < success rate < 1. Here the rule is that of `RolloutGroup.informative`: the correctness rewards (not their
    shaped sum) differ within the whole group. `low` and `high` narrow it to a band of success rates.

    The fresh part of a batch is as large as the selector's first choice of the step. Refills are chosen by the
    selector, which has seen everything rolled out so far, and hold no prompt that the step has rolled out already.
    The first groups that pass, in the order of generation, are trained on. Groups that pass beyond the need go to the
    replay buffer when the run has one, and are counted as wasted otherwise; groups that do not pass are dropped and
    counted as discarded.

    When `max_refills` rounds do not fill the batch, or the pool has no prompt left, the step trains on what passed,
    completed with replayed groups when the run has a buffer (`sampling/missing` counts the gap). When nothing passed
    and nothing can be replayed, the step trains on as many dropped groups as were needed, those nearest to the rule:
    what it would have done without this callback.

    Args:
        low: lowest success rate that passes, null for no bound; the border itself passes.
        high: highest success rate that passes, null for no bound; the border itself passes.
        max_refills: refill rounds in a step, at most; 0 only drops.
    """

    stage = Stage.FILTER

    def __init__(self, low: float | None = None, high: float | None = None, max_refills: int = 10) -> None:
        if low is not None and high is not None and not low <= high:
            raise UserError(f"{type(self).__name__}(low={low}, high={high}): expected low <= high, e.g. 0.3 and 0.7")
        if max_refills < 0:
            raise UserError(f"{type(self).__name__}(max_refills={max_refills}): expected 0 (only drop) or more")
        self.low = low
        self.high = high
        self.max_refills = max_refills
        self._warned = False

    def setup(self, trainer: Trainer, pl_module: GRPOModule, stage: str) -> None:
        self._datamodule: Any = trainer.datamodule  # type: ignore[attr-defined]
        callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
        self._replay = next((one for one in callbacks if isinstance(one, RolloutReplay)), None)
        self._reuses_references = any(isinstance(one, ReferenceRollouts) and one.reuse == "train" for one in callbacks)

    def passes(self, group: RolloutGroup) -> bool:
        """Whether a group is informative and its success rate lies in the band."""
        rate = group.success_rate
        return (
            group.informative
            and (self.low is None or rate >= self.low - REWARD_TOLERANCE)
            and (self.high is None or rate <= self.high + REWARD_TOLERANCE)
        )

    def on_train_batch_start(self, trainer: Trainer, pl_module: GRPOModule, batch: TrainBatch, batch_idx: int) -> None:
        needed = len(batch.prompts)
        measured = list(batch.groups)
        refills = 0
        while refills < self.max_refills and (size := self._refill_size(measured, needed)):
            prompts = self._datamodule.add_prompts(batch, size)
            if not prompts:
                break
            measured += self._roll(pl_module, batch, prompts)
            refills += 1
        passed = [group for group in measured if self.passes(group)]
        batch.groups, surplus = passed[:needed], passed[needed:]
        batch.dropped = [group for group in measured if not self.passes(group)]
        batch.surplus += surplus
        batch.metrics |= {
            "sampling/refills": float(refills),
            "sampling/dropped_fraction": len(batch.dropped) / max(1, len(measured)),
            "sampling/groups_per_passed": len(measured) / max(1, len(passed)),
            "sampling/surplus": float(len(surplus)),
            "sampling/missing": float(needed - len(batch.groups)),
        }
        if measured and not batch.groups and not self._can_replay:
            self._take_back(batch, needed)
        _count(batch, "discarded", batch.dropped)
        if self._replay is None:
            _count(batch, "wasted", surplus)

    def _refill_size(self, measured: Sequence[RolloutGroup], needed: int) -> int:
        passed = sum(map(self.passes, measured))
        if passed >= needed:
            return 0
        selector = self._datamodule.selector
        return max(1, selector.refill_size(needed - passed, needed, passed / max(1, len(measured))))

    def _roll(self, pl_module: GRPOModule, batch: TrainBatch, prompts: Sequence[Prompt]) -> list[RolloutGroup]:
        """Groups of the prompts; a reference group that this step's policy has just made is taken as it is."""
        wanted = {prompt.id for prompt in prompts}
        offered = [group for group in batch.surplus if group.prompt.id in wanted] if self._reuses_references else []
        batch.surplus = [group for group in batch.surplus if group not in offered]
        known = {group.prompt.id for group in offered}
        fresh = roll_fresh(
            self._datamodule.selector, pl_module, batch, [prompt for prompt in prompts if prompt.id not in known]
        )
        return offered + fresh

    @property
    def _can_replay(self) -> bool:
        return self._replay is not None and len(self._replay.buffer) > 0

    def _take_back(self, batch: TrainBatch, needed: int) -> None:
        """Trains on dropped groups after all: informative ones first, then those nearest to the band's middle."""
        low, high = (0.0 if self.low is None else self.low), (1.0 if self.high is None else self.high)

        def distance(group: RolloutGroup) -> tuple[bool, bool, float]:
            return not group.completions, not group.informative, abs(group.success_rate - (low + high) / 2)

        nearest = sorted(batch.dropped, key=distance)
        batch.groups = nearest[:needed]
        batch.dropped = [group for group in batch.dropped if group not in batch.groups]
        if not self._warned:
            self._warned = True
            rank_zero_warn(
                f"step {batch.step}: none of {len(nearest)} groups passed {type(self).__name__} after "
                f"{int(batch.metrics['sampling/refills'])} refills, so dropped groups are trained on: the prompts are "
                "too easy or too hard for the policy; add prompts of other difficulty, widen the band, or raise "
                "max_refills or model.sampling.num_generations (said once; sampling/missing counts every step)"
            )


def _count(batch: TrainBatch, name: str, groups: Sequence[RolloutGroup]) -> None:
    """Adds to the ledger what groups cost; reference groups are left out, since they have an account of their own."""
    fresh = [group for group in groups if group.source == "fresh"]
    batch.ledger.count(f"{name}/prompts", len(fresh))
    batch.ledger.count(f"{name}/completions", sum(len(group.completions) for group in fresh))
    batch.ledger.count(f"{name}/tokens", sum(group.completion_tokens for group in fresh))
