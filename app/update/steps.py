"""The optimizer steps of a batch: gradients summed over micro-batches, clipped, and skipped if not finite."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from app.objective.sketches import SketchSums
from app.ranks import Ranks, collective
from app.update.gradient_sum import sum_gradients
from app.update.group_measures import GroupMeasures
from app.update.learner import Learner
from app.update.minibatch import MiniBatch, shares, token_imbalance
from app.update.nonfinite import NonFiniteGuard, nonfinite_completions
from app.update.optimization import Optimization
from app.update.records import Seen, Update
from app.update.reuse import HeadNorms, Reuse, Reused

_NOTHING_TO_LEARN = (
    "No completion of a batch had an advantage, because rewards were equal within every group, so the weights did not "
    "change. Check reward_std and frac_reward_zero_std; updates/empty counts such updates. (Shown once.)"
)


class Updates:
    """Takes optimizer steps, and stops the run after several that were not finite."""

    def __init__(self, optimization: Optimization, reuse: Reuse = Reuse()) -> None:  # noqa: B008  # frozen
        self.optimization, self.reuse = optimization, reuse
        self.head_norms = HeadNorms()
        self.reused = Reused()
        """The further updates on the last batch."""
        self.guard = NonFiniteGuard()

    def take(
        self,
        learner: Learner,
        parts: Sequence[MiniBatch],
        step: int,
        *,
        optimizer: Optimizer,
        scheduler: LRScheduler,
        backward: Callable[[Tensor], None],
        measures: GroupMeasures | None = None,
        step_again: Callable[[], object] | None = None,
    ) -> list[Update]:
        """Take one optimizer step for each mini-batch of a batch. Collective.

        Every rank takes every step with the same gradient, including a rank without a sequence of the mini-batch.

        Args:
            learner: computes the loss.
            parts: the mini-batches, the same on all ranks.
            step: the batch's step.
            optimizer: over the trained parameters.
            scheduler: advanced with each optimizer step.
            backward: backward pass of a loss, in the trainer's precision.
            measures: to which what this rank's part shows of the groups is added.
            step_again: steps the optimizer for a further update on a mini-batch, which is not counted as a step of the
                run; needed for `Reuse`.
        """
        if not any(part.sequences for part in parts):
            rank_zero_warn(_NOTHING_TO_LEARN)
        ranks = learner.ranks
        dealt = [shares(part, ranks.size) for part in parts]
        mine = [share[ranks.rank] for share in dealt]
        if len(parts) > 1 or self.reuse.passes > 1:
            mine = [learner.with_old_logprobs(share) for share in mine]
        updates = []
        for part, all_shares, share in zip(parts, dealt, mine, strict=True):
            optimizer.zero_grad(set_to_none=True)
            if learner.sharded:
                # Passes are collectives: a barrier before them names a lost rank.
                ranks.barrier("update")
            sketches = None if measures is None else measures.sums
            if sketches is None and self.reuse.passes > 1:
                sketches = learner.sketch_sums(_groups(parts))
            before = None if sketches is None or self.reuse.passes == 1 else sketches.sums.clone()
            with collective("update"):
                seen = _accumulate(learner, share, backward, sketches, measures)
            if part.sequences and sketches is not None and before is not None:
                self.head_norms.add(_head_norm(sketches, before, ranks))
            seen = seen.over(ranks)
            if not learner.sharded:
                sum_gradients(learner.trained, ranks)
            norm = self.optimization.clip(learner.policy)
            # Loss and norm are the same on all ranks, so all of them decide alike.
            finite = bool(torch.isfinite(seen.loss) & torch.isfinite(norm))
            if not finite:
                learner.policy.zero_grad(set_to_none=True)
                self.guard.skipped(step, seen.loss, norm, nonfinite_completions(learner, share, backward))
            elif part.sequences:
                self.guard.passed()
            # Without gradients (nothing to learn, or not finite) AdamW changes no weight, but the schedule and
            # Lightning's step counter must advance.
            rate = optimizer.param_groups[0]["lr"]
            optimizer.step()
            self.optimization.check_weights(learner.policy, ranks, step)
            scheduler.step()
            imbalance = token_imbalance(all_shares) if ranks.size > 1 else None
            updates.append(Update(seen, norm, rate, not finite, imbalance))
        self.reused = Reused()
        if step_again is not None and not any(update.skipped for update in updates):
            self._take_again(learner, parts, mine, step, optimizer, backward, step_again)
        return updates

    def _take_again(
        self,
        learner: Learner,
        parts: Sequence[MiniBatch],
        mine: Sequence[MiniBatch],
        step: int,
        optimizer: Optimizer,
        backward: Callable[[Tensor], None],
        step_again: Callable[[], object],
    ) -> None:
        """Take the further updates that `Reuse` asks for, until its gate closes. Collective."""
        ranks, threshold = learner.ranks, self.reuse.threshold
        if threshold is not None and not self.head_norms.known:
            return
        for _ in range(self.reuse.passes - 1):
            for part, share in zip(parts, mine, strict=True):
                groups = {one.group for one in part.sequences if one.advantage}
                if not groups:
                    continue
                optimizer.zero_grad(set_to_none=True)
                rows = [row for row, one in enumerate(share.sequences) if one.advantage]
                again = dataclasses.replace(
                    share, sequences=[share.sequences[row] for row in rows], ids=[share.ids[row] for row in rows]
                )
                sums = learner.sketch_sums(_groups(parts))
                if learner.sharded:
                    ranks.barrier("update")
                with collective("update"):
                    seen = _accumulate(learner, again, backward, sums, updated=True)
                loss = seen.over(ranks).loss
                head = _head_norm(sums, None, ranks)
                z_score = self.head_norms.z_score(head) if self.head_norms.known else math.nan
                self.reused = dataclasses.replace(self.reused, z_score=z_score)
                if not learner.sharded:
                    sum_gradients(learner.trained, ranks)
                norm = self.optimization.clip(learner.policy)
                finite = bool(torch.isfinite(loss) & torch.isfinite(norm)) and math.isfinite(head)
                if not finite or (threshold is not None and z_score > threshold):
                    learner.policy.zero_grad(set_to_none=True)
                    return
                step_again()
                self.optimization.check_weights(learner.policy, ranks, step)
                self.reused = Reused(self.reused.updates + 1, self.reused.groups + len(groups), z_score)


def _groups(parts: Sequence[MiniBatch]) -> int:
    """Return a number of groups that has room for the index of each."""
    return 1 + max((one.group for part in parts for one in part.sequences), default=0)


def _head_norm(sums: SketchSums, before: Tensor | None, ranks: Ranks) -> float:
    """Return the norm of the output head's gradient, estimated by what sketches have gained. Collective."""
    gained = sums.sums if before is None else sums.sums - before
    return float(ranks.sum(sums.projection.fold(gained.sum(0, keepdim=True))).norm())


def _accumulate(
    learner: Learner,
    share: MiniBatch,
    backward: Callable[[Tensor], None],
    sketches: SketchSums | None,
    measures: GroupMeasures | None = None,
    *,
    updated: bool = False,
) -> Seen:
    """Add up the gradients of a share's micro-batches."""
    seen, micro = Seen.nothing(learner.device), learner.microbatches
    plan = micro.plan(share.sequences)
    idle = micro.idle(len(plan))
    for rows in plan:
        sequences = [share.sequences[row] for row in rows]
        packed = micro.one(sequences)
        tokens = ((one.group, one.generated_tokens) for one in sequences)
        found = learner.loss_of(packed, None if sketches is None else sketches.of(tokens), updated=updated)
        backward(found.loss)
        seen = seen.plus(packed, found)
        if measures is not None:
            measures.add(sequences, packed, found)
    for packed in idle:
        backward(learner.loss_of(packed).loss)
    return seen
