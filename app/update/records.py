"""Records of an update: loss, statistics and tokens of a mini-batch, and the optimizer step."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from app.objective.packing import PackedBatch
from app.objective.statistics import Statistics
from app.objective.surrogate import PolicyLoss
from app.ranks import Ranks


@dataclass(frozen=True, slots=True, eq=False)
class Seen:
    """Totals over the micro-batches of a mini-batch.

    Attributes:
        loss: scalar, the mini-batch's loss.
        all: statistics of every generated token.
        replayed: statistics of replayed tokens.
        positions: tokens of the forward passes, padding included.
        tokens: tokens without padding.
        sequence_tokens: tokens of all prompts and completions, a prompt counted once per completion.
    """

    loss: Tensor
    all: Statistics
    replayed: Statistics
    positions: int = 0
    tokens: int = 0
    sequence_tokens: int = 0

    @classmethod
    def nothing(cls, device: torch.device) -> Seen:
        """Return the totals before the first micro-batch."""
        return cls(torch.zeros((), device=device), Statistics.empty(device), Statistics.empty(device))

    def plus(self, packed: PackedBatch, found: PolicyLoss) -> Seen:
        """Return the totals with one more micro-batch and its loss."""
        return Seen(
            self.loss + found.loss.detach(),
            self.all.merge(found.statistics),
            self.replayed.merge(found.terms.statistics(packed.replayed)),
            self.positions + packed.input_ids.numel(),
            self.tokens + packed.real_tokens,
            self.sequence_tokens + packed.sequence_tokens,
        )

    def over(self, ranks: Ranks) -> Seen:
        """Return the totals over all ranks. Collective."""
        if ranks.size == 1:
            return self
        device = self.loss.device
        counts = torch.tensor([self.positions, self.tokens, self.sequence_tokens], dtype=torch.float64, device=device)
        parts = [self.loss.reshape(1), self.all.sums, self.replayed.sums, counts]
        sizes = [len(part) for part in parts]
        loss, sums, replayed, counts = ranks.sum(torch.cat([part.double() for part in parts])).split(sizes)
        maxima, others = ranks.max(torch.stack([self.all.maxima, self.replayed.maxima])).to(device)
        return Seen(
            loss.float().reshape(()).to(device),
            Statistics(sums.float().to(device), maxima),
            Statistics(replayed.float().to(device), others),
            *(int(count) for count in counts),
        )


@dataclass(frozen=True, slots=True, eq=False)
class Update:
    """One optimizer step.

    Attributes:
        seen: totals of its forward passes, over all ranks.
        grad_norm: scalar, before clipping.
        learning_rate: the rate of the step.
        skipped: the loss or the gradient was not finite, so the weights did not change.
        imbalance: excess of the busiest rank's tokens over the mean; None in a run of one process.
    """

    seen: Seen
    grad_norm: Tensor
    learning_rate: float
    skipped: bool
    imbalance: float | None
