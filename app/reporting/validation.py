"""Validation metrics: accuracy, pass@k, reward and completion length over all prompts."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import nn
from torchmetrics import MeanMetric, Metric, SumMetric

from datamodules.types import RolloutGroup

CORRECT = 0.5
"""A completion counts as correct when its correctness reward is above this."""


class PassAtK(Metric):
    """Unbiased pass@k: the mean over prompts of `1 - C(n - c, k) / C(n, k)` for `c` correct of `n` completions.

    Chen et al., arXiv 2107.03374, equation 1: the chance that at least one of `k` draws without replacement is correct.
    Prompts with fewer than `k` completions are left out; `k` is at least 1.
    """

    full_state_update = False
    total: torch.Tensor
    prompts: torch.Tensor

    def __init__(self, k: int) -> None:
        # Every rank sees all prompts.
        super().__init__(sync_on_compute=False)
        self.k = k
        self.add_state("total", torch.tensor(0.0, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("prompts", torch.tensor(0), dist_reduce_fx="sum")

    def update(self, correct: torch.Tensor) -> None:
        """Add one prompt; `correct` is bool `[n]`."""
        n, c = correct.numel(), int(correct.sum())
        if n >= self.k:
            self.total += 1 - math.comb(n - c, self.k) / math.comb(n, self.k)
            self.prompts += 1

    def compute(self) -> torch.Tensor:
        """Return a float32 scalar, NaN before the first prompt."""
        return (self.total / self.prompts).float() if self.prompts else torch.tensor(float("nan"))


class PromptMean(Metric):
    """Mean over prompts, summed in float64."""

    full_state_update = False
    total: torch.Tensor
    prompts: torch.Tensor

    def __init__(self) -> None:
        super().__init__(sync_on_compute=False)
        self.add_state("total", torch.tensor(0.0, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("prompts", torch.tensor(0), dist_reduce_fx="sum")

    def update(self, value: float) -> None:
        """Add the value of one prompt."""
        self.total += value
        self.prompts += 1

    def compute(self) -> torch.Tensor:
        """Return a float32 scalar, NaN before the first prompt."""
        return (self.total / self.prompts).float() if self.prompts else torch.tensor(float("nan"))


class ValidationMetrics(nn.Module):
    """Accuracy and pass@k by the correctness rewards, the mean of every reward, and mean completion length.

    Accuracy and the means of the rewards are means over prompts, next to the number of these prompts, so that
    accuracies by task add up: for rewards of 0 and 1 that each apply to prompts of their own, the sum of prompts times
    mean is that of all prompts. It is a module so that the trainer moves the metrics with the policy and resets them.
    Every rank sees the groups of all (`RolloutPipeline`), so there is nothing to reduce.

    Args:
        k: of pass@k.
        rewards: names of the rewards.
    """

    def __init__(self, k: int, rewards: Sequence[str] = ()) -> None:
        super().__init__()
        self.reward, self.length, self.unscored, self.failed = (MeanMetric(sync_on_compute=False) for _ in range(4))
        self.accuracy, self.pass_at_k = PromptMean(), PassAtK(k)
        self.prompts, self.pass_at_k_prompts = SumMetric(sync_on_compute=False), SumMetric(sync_on_compute=False)
        self._names = tuple(rewards)
        self._means = [PromptMean() for _ in rewards]
        self._prompts = [SumMetric(sync_on_compute=False) for _ in rewards]
        self._moved = nn.ModuleList([*self._means, *self._prompts])

    def update(self, groups: Sequence[RolloutGroup], counts: Mapping[str, float] | None = None) -> None:
        """Add a batch.

        Args:
            groups: its groups.
            counts: those of its ledger, which know of the completions that are not in the groups.
        """
        if counts is not None and (completions := counts["rewards/completions"]):
            self.unscored.update(counts["rewards/unscored"] / completions, completions)
            self.failed.update(counts["rewards/failed"] / completions, completions)
        for group in groups:
            correct = torch.from_numpy(group.correctness) > CORRECT
            self.prompts.update(float(len(correct) > 0))
            self.pass_at_k_prompts.update(float(len(correct) >= self.pass_at_k.k))
            self.pass_at_k.update(correct)
            self.reward.update(torch.from_numpy(group.rewards))
            self.length.update(torch.tensor([float(len(one.token_ids)) for one in group.completions]))
            if len(correct):
                self.accuracy.update(float(correct.double().mean()))
            for name, mean, prompts in zip(self._names, self._means, self._prompts, strict=True):
                values = group.components[name][~np.isnan(group.components[name])]
                if len(values):
                    mean.update(float(values.mean(dtype=np.float64)))
                    prompts.update(1.0)

    def named(self, stage: str) -> dict[str, Metric]:
        """Return the metrics by the names they are logged under, without rewards that have applied to no prompt.

        `stage` is "val" or "test".
        """
        passed = f"{stage}/pass@{self.pass_at_k.k}"
        found: dict[str, Metric] = {
            f"{stage}/accuracy": self.accuracy,
            passed: self.pass_at_k,
            f"{stage}/reward": self.reward,
            f"{stage}/completions/mean_length": self.length,
            f"{stage}/prompts": self.prompts,
            f"{passed}_prompts": self.pass_at_k_prompts,
            f"{stage}/unscored_fraction": self.unscored,
            f"{stage}/failed_fraction": self.failed,
        }
        for name, mean, prompts in zip(self._names, self._means, self._prompts, strict=True):
            if mean.prompts:
                found |= {f"{stage}/rewards/{name}/mean": mean, f"{stage}/rewards/{name}/prompts": prompts}
        return found
