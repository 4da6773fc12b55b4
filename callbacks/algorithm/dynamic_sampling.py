"""Dynamic sampling: drop groups without a learning signal and roll out others until the batch is full."""

from __future__ import annotations

from collections.abc import Sequence

from lightning.pytorch import Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from app.module import GRPOModule
from callbacks.algorithm.references import ReferenceRollouts
from callbacks.algorithm.replay import RolloutReplay
from callbacks.algorithm.rollouts import Rollouts
from callbacks.stages import Stage, StepCallback
from datamodules.errors import UserError
from datamodules.online import OnlinePromptDataModule
from datamodules.types import REWARD_TOLERANCE, RolloutGroup, TrainBatch


class DynamicSampling(StepCallback):
    """Drops groups with equal correctness rewards and refills the batch, with any selector.

    DAPO (Yu et al. 2025, arXiv 2503.14476, section 3.2) keeps sampling until the batch holds only prompts with
    0 < success rate < 1. Here a group passes if its correctness rewards, not their shaped sum, differ, and its success
    rate lies between `low` and `high`.

    Refills are chosen by the selector, which has observed everything rolled out so far, and contain no prompt that the
    step has already rolled out. The first groups that pass, in the order of generation, are trained on. Further ones go
    to the replay buffer if the run has one, and are counted as wasted otherwise.

    When `max_refills` rounds do not fill the batch, or the pool has no prompt left, the step trains on the groups that
    passed and on replayed ones. When there are neither, it trains on as many dropped groups as were needed, preferring
    those nearest to the middle of the band.

    Args:
        low: lowest success rate that passes, inclusive; null for no bound.
        high: highest success rate that passes, inclusive; null for no bound.
        max_refills: largest number of refill rounds in a step; 0 only drops.
    """

    stage = Stage.FILTER

    def __init__(self, low: float | None = None, high: float | None = None, max_refills: int = 10) -> None:
        name = type(self).__name__
        if low is not None and high is not None and not low <= high:
            raise UserError(
                f"{name} has low={low} and high={high}, expected low <= high. Set, for example, 0.3 and 0.7."
            )
        if max_refills < 0:
            raise UserError(f"{name}.max_refills is {max_refills}, expected at least 0. Set 0 to drop without refills.")
        self.low = low
        self.high = high
        self.max_refills = max_refills
        self._warned = False

    def setup(self, trainer: Trainer, pl_module: GRPOModule, stage: str) -> None:
        self._data = OnlinePromptDataModule.of(trainer)
        self._rollouts = next(iter(Rollouts.all_of(trainer)), Rollouts())
        self._replay = next(iter(RolloutReplay.all_of(trainer)), None)
        self._reuses_references = any(one.reuse == "train" for one in ReferenceRollouts.all_of(trainer))

    def passes(self, group: RolloutGroup) -> bool:
        """Return whether a group is informative and its success rate lies in the band."""
        rate = group.success_rate
        return (
            group.informative
            and (self.low is None or rate >= self.low - REWARD_TOLERANCE)
            and (self.high is None or rate <= self.high + REWARD_TOLERANCE)
        )

    def on_train_batch_start(self, trainer: Trainer, pl_module: GRPOModule, batch: TrainBatch, batch_idx: int) -> None:
        needed = len(batch.prompts)
        refills = 0
        while refills < self.max_refills and (size := self._refill_size(_measured(batch), needed)):
            prompts = self._data.add_prompts(batch, size)
            if not prompts:
                break
            # A reference group of this step's policy is used as it is.
            added = {prompt.id for prompt in prompts}
            offered = [group for group in batch.of("surplus") if self._reuses_references and group.prompt.id in added]
            batch.move(offered, "trained")
            known = {group.prompt.id for group in offered}
            missing = [one for one in prompts if one.id not in known]
            self._rollouts.roll_out(self._data.selector, pl_module, batch, missing)
            refills += 1
        measured = _measured(batch)
        passed = [group for group in measured if self.passes(group)]
        surplus, dropped = passed[needed:], [group for group in measured if not self.passes(group)]
        batch.move(surplus, "surplus")
        batch.move(dropped, "dropped")
        batch.metrics |= {
            "sampling/refills": float(refills),
            "sampling/dropped_fraction": len(dropped) / max(1, len(measured)),
            "sampling/groups_per_passed": len(measured) / max(1, len(passed)),
            "sampling/surplus": float(len(surplus)),
            "sampling/missing": float(needed - len(batch.groups)),
        }
        if measured and not passed and not (self._replay is not None and len(self._replay.buffer)):
            self._train_on_dropped(batch, needed, refills)
        count_rollouts(batch, "discarded", batch.of("dropped"))
        if self._replay is None:
            count_rollouts(batch, "wasted", surplus)

    def _refill_size(self, measured: Sequence[RolloutGroup], needed: int) -> int:
        passed = sum(map(self.passes, measured))
        if passed >= needed:
            return 0
        return max(1, self._data.selector.refill_size(needed - passed, needed, passed / max(1, len(measured))))

    def _train_on_dropped(self, batch: TrainBatch, needed: int, refills: int) -> None:
        low, high = (0.0 if self.low is None else self.low), (1.0 if self.high is None else self.high)

        def distance(group: RolloutGroup) -> tuple[bool, bool, float]:
            return not group.completions, not group.informative, abs(group.success_rate - (low + high) / 2)

        nearest = sorted(batch.of("dropped"), key=distance)
        batch.move(nearest[:needed], "trained")
        if not self._warned:
            self._warned = True
            rank_zero_warn(
                f"Step {batch.step}: none of {len(nearest)} groups passed {type(self).__name__} after {refills} "
                "refills, so dropped groups are trained on: the prompts are too easy or too hard for the policy. Add "
                "prompts of other difficulty, widen the band, or raise max_refills or model.sampling.num_generations. "
                "This warning is shown once; sampling/missing counts every step."
            )


class Balanced(DynamicSampling):
    """Dynamic sampling that keeps groups of medium difficulty only (Bae et al. 2025, arXiv 2504.03380).

    Args:
        low: lowest success rate that passes, inclusive.
        high: highest success rate that passes, inclusive.
        max_refills: largest number of refill rounds in a step; 0 only drops.
    """

    def __init__(self, low: float = 0.3, high: float = 0.7, max_refills: int = 10) -> None:
        super().__init__(low=low, high=high, max_refills=max_refills)


def _measured(batch: TrainBatch) -> list[RolloutGroup]:
    """Return the groups of a step that pass or not: `Pilots` has dropped some after a part of their completions."""
    return batch.of("trained", "dropped")


def count_rollouts(batch: TrainBatch, name: str, groups: Sequence[RolloutGroup]) -> None:
    """Add the cost of groups to the ledger, without reference groups, which are counted separately."""
    fresh = [group for group in groups if group.source == "fresh"]
    batch.ledger.count(f"{name}/prompts", len(fresh))
    batch.ledger.count(f"{name}/completions", sum(len(group.completions) for group in fresh))
    batch.ledger.count(f"{name}/tokens", sum(group.completion_tokens for group in fresh))
