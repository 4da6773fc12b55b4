"""The unbiased pass@k estimate as a torchmetrics metric."""

from __future__ import annotations

import math

import torch
from torchmetrics import Metric

CORRECT = 0.5
"""A completion counts as correct when its correctness reward is above this."""


class PassAtK(Metric):
    """Mean over prompts of `1 - C(n - c, k) / C(n, k)` (Chen et al., arXiv 2107.03374, equation 1).

    `n` completions of a prompt, `c` of them correct. It is the chance that at least one of `k` draws without
    replacement is correct. Prompts with fewer than `k` completions are left out.

    Args:
        k: draws, at least 1.
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
        """Adds one prompt; `correct` bool `[n]`."""
        n, c = correct.numel(), int(correct.sum())
        if n < self.k:
            return
        self.total += 1 - math.comb(n - c, self.k) / math.comb(n, self.k)
        self.prompts += 1

    def compute(self) -> torch.Tensor:
        """float32 scalar; NaN before any prompt."""
        return (self.total / self.prompts).float() if self.prompts else torch.tensor(float("nan"))
