"""The layout of a mini-batch's sequences as micro-batches for the policy."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from app.objective.packing import PackedBatch, ScoredSequence, collate, pack, plan_microbatches, plan_packs
from app.policy.scoring import can_share_prompts
from app.ranks import Ranks


@dataclass(frozen=True, slots=True, eq=False)
class MicroBatches:
    """Lays sequences out for a policy."""

    policy: torch.nn.Module
    max_tokens: int  # of one micro-batch, padding included
    share_prompts: bool  # read a prompt once for all its completions, if the policy allows it
    pad_token_id: int
    device: torch.device
    together: Ranks | None = None  # if every forward pass needs all ranks because the policy is sharded

    def of(self, sequences: Sequence[ScoredSequence]) -> Iterator[PackedBatch]:
        """Yield micro-batches within the token budget, each laid out when it is its turn."""
        return (self.one([sequences[row] for row in rows]) for rows in self.plan(sequences))

    def plan(self, sequences: Sequence[ScoredSequence]) -> list[list[int]]:
        """Split sequences into micro-batches within the token budget; return the indices of each one's sequences."""
        if self._shares:
            return plan_packs(sequences, self.max_tokens)
        return plan_microbatches([len(sequence) for sequence in sequences], self.max_tokens)

    def one(self, sequences: Sequence[ScoredSequence]) -> PackedBatch:
        """Lay all sequences out as one micro-batch."""
        if self._shares:
            return pack(sequences, self.device)
        return collate(sequences, self.pad_token_id, self.device)

    def idle(self, passes: int) -> list[PackedBatch]:
        """Return micro-batches without weight, which bring a rank with `passes` to the most passes of any rank.

        Collective if the policy is sharded. Call it before the first pass: passes are collectives too, so that a rank
        with few of them would otherwise wait here for a rank that waits for it there.
        """
        if self.together is None:
            return []
        most = int(self.together.max(torch.tensor(passes)))
        return [self.nothing() for _ in range(most - passes)]

    def nothing(self) -> PackedBatch:
        """Return a micro-batch whose loss and gradient are 0."""
        ids = [self.pad_token_id]
        return self.one([ScoredSequence(ids, ids, [0.0], advantage=0.0, weight=0.0)])

    @property
    def _shares(self) -> bool:
        return self.share_prompts and can_share_prompts(self.policy)
