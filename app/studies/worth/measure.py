"""The gain of one step on chosen groups, and the agreement of groups' gradients."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from app.objective.packing import PackedBatch
from app.objective.ratios import bounded_exp
from app.objective.statistics import Statistics
from app.policy.scoring import completion_logprobs
from app.studies.worth.walk import Walker
from app.update.minibatch import MiniBatch, sequence_of
from datamodules.types import RolloutGroup


@dataclass(frozen=True, slots=True, eq=False)
class GroupGradient:
    """The gradient of one group.

    Attributes:
        flat: float32 `[P]`, scaled as `Gradients` says.
        sketch: of the output head's part, scaled alike.
        seen: statistics of its tokens.
    """

    flat: Tensor
    sketch: Tensor
    seen: Statistics


class Gradients:
    """Gradients of single groups at a policy, flat and scaled so that those of a batch's groups add up.

    The gradient of a batch is `sum(gradients) / sum(sizes)` of its groups: a group's size is its number of tokens where
    the loss averages over tokens, and its number of completions where it averages over these.

    Args:
        walker: holds the policy and AdamW's second moments.
    """

    def __init__(self, walker: Walker) -> None:
        self._walker = walker
        learner = walker.module.learner
        # The loss at the policy itself: of the first optimizer step, relative to the behaviour policy as in training.
        self._learner = dataclasses.replace(learner, options=dataclasses.replace(learner.options, mini_batches=1))
        optimizer = walker.optimizer
        moments = [optimizer.state.get(one, {}) for one in walker.parameters]  # empty before the first gradient
        group = optimizer.param_groups[0]
        self._decay, self._eps, steps = group["betas"][1], group["eps"], float(moments[0].get("step", 0))
        self._second = torch.cat(
            [
                state.get("exp_avg_sq", torch.zeros_like(one)).float().reshape(-1)
                for state, one in zip(moments, walker.parameters, strict=True)
            ]
        )
        self._correction = 1 - self._decay ** (steps + 1)

    def scale(self, squared: Tensor) -> Tensor:
        """Return what AdamW multiplies a gradient by, `1 / (sqrt(v) + eps)`, float32 `[P]`.

        Its second moments `v` take in the gradient itself, as in its step: one that they have not seen before, such as
        that of a rare token, would be multiplied by `1 / eps`.

        Args:
            squared: the square of the gradient, float32 `[P]`.
        """
        second = (self._decay * self._second + (1 - self._decay) * squared) / self._correction
        return 1 / (second.sqrt() + self._eps)

    def of(self, group: RolloutGroup, step: int) -> GroupGradient:
        """Return the gradient of a group in a batch of this step."""
        learner, [part] = self._learner, self._parts(group, step)
        learner.policy.zero_grad(set_to_none=True)
        seen, sums, micro = Statistics.empty(learner.device), learner.sketch_sums(1), learner.microbatches
        with torch.enable_grad():
            for rows in micro.plan(part.sequences):
                sequences = [part.sequences[row] for row in rows]
                with self._walker.precision():
                    tokens = [(0, one.generated_tokens) for one in sequences]
                    found = learner.loss_of(micro.one(sequences), sums.of(tokens))
                found.loss.backward()
                seen = seen.merge(found.statistics)
        flat = [
            torch.zeros(one.numel(), device=one.device) if one.grad is None else one.grad.float().reshape(-1)
            for one in self._walker.parameters
        ]
        learner.policy.zero_grad(set_to_none=True)
        size = self.size(group)
        return GroupGradient(torch.cat(flat) * size, sums.folded()[0] * size, seen)

    def size(self, group: RolloutGroup) -> float:
        """Return the share of a group in a batch, in the unit of `Gradients`."""
        by_tokens = self._learner.options.aggregation == "token"
        if self._learner.options.aggregation == "token_sum":
            return 1.0
        return float(group.completion_tokens if by_tokens else len(group.completions))

    def _parts(self, group: RolloutGroup, step: int) -> list[MiniBatch]:
        return self._learner.minibatches_of([group], self._learner.advantages_of([group]), step)


def sum_of(gradients: Sequence[GroupGradient]) -> Tensor:
    """Return the sum of flat gradients, `[P]`."""
    return torch.stack([one.flat for one in gradients]).sum(0)


class HeldOut:
    """The expected reward on held-out prompts, by importance weighting of completions sampled once.

    With completions `y` of the policy `pi` with rewards `r`, the success of another policy `pi'` is
    `E[r pi'(y) / pi(y)]`. Its gain is estimated by the mean over prompts and completions of
    `(pi'(y) / pi(y) - 1) (r - b)`, where `b` is the mean reward of the prompt's other completions: unbiased, since a
    ratio has mean 1 and `b` does not depend on `y`. Every policy is measured on the same completions, so their
    differences have far less noise than those of two samples. A group with equal rewards adds exactly nothing.

    Args:
        walker: holds the policy that has sampled the completions.
        groups: scored groups of the held-out prompts.
    """

    def __init__(self, walker: Walker, groups: Sequence[RolloutGroup]) -> None:
        self._walker, self._learner = walker, walker.module.learner
        scored = [one for one in groups if len(one.completions) > 1]
        self.success = float(np.mean([one.success_rate for one in scored]))
        self._prompts = len(scored)
        sequences = [
            sequence_of(group.prompt, one, float(lead), 1 / len(group.completions))
            for group in scored
            if group.informative
            for one, lead in zip(group.completions, _leads(group.correctness), strict=True)
            if one.generated_tokens
        ]
        micro = self._learner.microbatches
        self._batches = [micro.one([sequences[row] for row in rows]) for rows in micro.plan(sequences)]
        self._before = [self._logprobs(one) for one in self._batches]

    @torch.no_grad()
    def gain(self) -> float:
        """Return the estimated success of the walker's present policy minus that of the one that has sampled."""
        total = 0.0
        for packed, before in zip(self._batches, self._before, strict=True):
            moved = self._logprobs(packed) - before
            of_sequence = torch.zeros(int(packed.sequences.max()) + 1, device=moved.device)
            last = torch.ones_like(packed.sequences, dtype=torch.bool)
            last[:-1] = packed.sequences[1:] != packed.sequences[:-1]
            ratio = bounded_exp(of_sequence.index_add(0, packed.sequences, moved))
            total += float(((ratio - 1) * packed.advantages[last] * packed.weights[last]).double().sum())
        return total / self._prompts

    @torch.no_grad()
    def _logprobs(self, packed: PackedBatch) -> Tensor:
        with self._walker.precision():
            found, _ = completion_logprobs(
                self._learner.policy, packed, self._learner.options.temperature, with_entropy=False
            )
        return found.float()


def _leads(rewards: np.ndarray) -> np.ndarray:
    """Return each reward minus the mean of the others, `[G]`."""
    others = (rewards.sum(dtype=np.float64) - rewards) / (len(rewards) - 1)
    return np.asarray(rewards - others)


@torch.no_grad()
def stepped(walker: Walker, start: Sequence[Tensor], step: Tensor) -> None:
    """Move the policy from `start` by minus a flat step `[P]`."""
    parts = step.split([one.numel() for one in walker.parameters])
    walker.load([one - part.view_as(one).to(one.dtype) for one, part in zip(start, parts, strict=True)])
