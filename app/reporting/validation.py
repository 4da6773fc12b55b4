"""What validation measures, over all its prompts and ranks."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from torchmetrics import MeanMetric, Metric

from app.reporting.pass_at_k import CORRECT, PassAtK
from datamodules.types import RolloutGroup


class ValidationMetrics(nn.Module):
    """Accuracy and pass@k by the correctness reward, mean reward and mean length of the completions.

    A module, so that the trainer moves the metrics with the policy and resets them. Every rank sees the groups of all
    (`RolloutPipeline`), so there is nothing to reduce.

    Args:
        k: of pass@k, at least 1.
    """

    def __init__(self, k: int) -> None:
        super().__init__()
        self.accuracy, self.reward, self.length = (MeanMetric(sync_on_compute=False) for _ in range(3))
        self.pass_at_k = PassAtK(k)

    def update(self, groups: Sequence[RolloutGroup]) -> None:
        """Adds the groups of a batch."""
        for group in groups:
            correct = torch.from_numpy(group.correctness) > CORRECT
            self.accuracy.update(correct.float(), 1.0)
            self.pass_at_k.update(correct)
            self.reward.update(torch.from_numpy(group.rewards))
            self.length.update(torch.tensor([float(len(one.token_ids)) for one in group.completions]))

    def named(self, stage: str) -> dict[str, Metric]:
        """The metrics by the names that they are logged under; `stage` is "val" or "test"."""
        return {
            f"{stage}/accuracy": self.accuracy,
            f"{stage}/pass@{self.pass_at_k.k}": self.pass_at_k,
            f"{stage}/reward": self.reward,
            f"{stage}/completions/mean_length": self.length,
        }
