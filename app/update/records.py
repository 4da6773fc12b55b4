"""Records of an update: tokens read, loss and statistics of a mini-batch, and the optimizer step."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from app.objective.packing import PackedBatch
from app.objective.statistics import Statistics
from app.objective.surrogate import PolicyLoss
from app.ranks import Ranks


@dataclass(frozen=True, slots=True)
class TokensRead:
    """Tokens that the forward passes of an update computed.

    Attributes:
        positions: tokens, padding included.
        tokens: tokens without padding.
        sequence_tokens: tokens of all prompts and completions, a prompt counted once per completion.
    """

    positions: int = 0
    tokens: int = 0
    sequence_tokens: int = 0

    def plus(self, packed: PackedBatch) -> TokensRead:
        """Return the counts with one more micro-batch."""
        return TokensRead(
            self.positions + packed.input_ids.numel(),
            self.tokens + packed.real_tokens,
            self.sequence_tokens + packed.sequence_tokens,
        )


@dataclass(frozen=True, slots=True, eq=False)
class Seen:
    """Totals over the micro-batches of a mini-batch.

    Attributes:
        loss: scalar, the mini-batch's loss.
        all: statistics of every completion token.
        replayed: statistics of replayed tokens.
        read: tokens of the forward passes.
    """

    loss: Tensor
    all: Statistics
    replayed: Statistics
    read: TokensRead

    @classmethod
    def nothing(cls, device: torch.device) -> Seen:
        """Return the totals before the first micro-batch."""
        return cls(torch.zeros((), device=device), Statistics.empty(device), Statistics.empty(device), TokensRead())

    def plus(self, packed: PackedBatch, found: PolicyLoss) -> Seen:
        """Return the totals with one more micro-batch and its loss."""
        return Seen(
            self.loss + found.loss.detach(),
            self.all.merge(found.statistics),
            self.replayed.merge(found.terms.statistics(packed.replayed)),
            self.read.plus(packed),
        )

    def over(self, ranks: Ranks) -> Seen:
        """Return the totals over all ranks. Collective."""
        if ranks.size == 1:
            return self
        device, read = self.loss.device, self.read
        counts = torch.tensor([read.positions, read.tokens, read.sequence_tokens], dtype=torch.float64, device=device)
        parts = [self.loss.reshape(1), self.all.sums, self.replayed.sums, counts]
        sizes = [len(part) for part in parts]
        loss, sums, replayed, counts = ranks.sum(torch.cat([part.double() for part in parts])).split(sizes)
        maxima, others = ranks.max(torch.stack([self.all.maxima, self.replayed.maxima])).to(device)
        return Seen(
            loss.float().reshape(()).to(device),
            Statistics(sums.float().to(device), maxima),
            Statistics(replayed.float().to(device), others),
            TokensRead(*(int(count) for count in counts)),
        )


@dataclass(frozen=True, slots=True, eq=False)
class Update:
    """One optimizer step.

    Attributes:
        seen: totals of its forward passes, over all ranks.
        grad_norm: scalar, before clipping.
        skipped: the loss or the gradient was not finite, so the weights did not change.
    """

    seen: Seen
    grad_norm: Tensor
    skipped: bool
