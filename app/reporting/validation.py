"""Validation metrics: accuracy, pass@k, reward and completion length over all prompts."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import nn
from torchmetrics import MeanMetric, Metric

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


class ValidationMetrics(nn.Module):
    """Accuracy and pass@k by the correctness reward, mean reward and mean completion length.

    It is a module so that the trainer moves the metrics with the policy and resets them. Every rank sees the groups of
    all (`RolloutPipeline`), so there is nothing to reduce.
    """

    def __init__(self, k: int) -> None:
        super().__init__()
        self.accuracy, self.reward, self.length = (MeanMetric(sync_on_compute=False) for _ in range(3))
        self.pass_at_k = PassAtK(k)

    def update(self, groups: Sequence[RolloutGroup]) -> None:
        """Add the groups of a batch."""
        for group in groups:
            correct = torch.from_numpy(group.correctness) > CORRECT
            self.accuracy.update(correct.float(), 1.0)
            self.pass_at_k.update(correct)
            self.reward.update(torch.from_numpy(group.rewards))
            self.length.update(torch.tensor([float(len(one.token_ids)) for one in group.completions]))

    def named(self, stage: str) -> dict[str, Metric]:
        """Return the metrics by the names they are logged under; `stage` is "val" or "test"."""
        return {
            f"{stage}/accuracy": self.accuracy,
            f"{stage}/pass@{self.pass_at_k.k}": self.pass_at_k,
            f"{stage}/reward": self.reward,
            f"{stage}/completions/mean_length": self.length,
        }
