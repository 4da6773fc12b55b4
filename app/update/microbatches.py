"""From the sequences of a mini-batch to what the policy reads in one pass."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from app.objective.packing import PackedBatch, ScoredSequence, collate, pack, plan_microbatches, plan_packs
from app.policy.scoring import can_share_prompts, score
from app.ranks import Ranks
from app.update.minibatch import MiniBatch


@dataclass(frozen=True, slots=True, eq=False)
class MicroBatches:
    """Lays sequences out for a policy. Made where it is used, so that it never holds a policy wrapped since.

    Attributes:
        policy: the model.
        temperature: that completions are sampled with.
        max_tokens: of one micro-batch, padding included.
        share_prompts: whether a prompt is read once for all its completions, where the policy allows it.
        pad_token_id: any valid id.
        device: where the policy is.
        together: the ranks, where every pass needs all of them because the policy is cut over them; else None.
    """

    policy: torch.nn.Module
    temperature: float
    max_tokens: int
    share_prompts: bool
    pad_token_id: int
    device: torch.device
    together: Ranks | None = None

    def of(self, sequences: Sequence[ScoredSequence]) -> list[PackedBatch]:
        """Micro-batches within the token budget; each sequence is in one of them."""
        return [self.one([sequences[index] for index in rows]) for rows in self._plan(sequences)]

    def one(self, sequences: Sequence[ScoredSequence]) -> PackedBatch:
        """All the sequences as one micro-batch."""
        if self._shares:
            return pack(sequences, self.device)
        return collate(sequences, self.pad_token_id, self.device)

    def idle(self, passes: int) -> list[PackedBatch]:
        """Micro-batches without weight, for a rank to make as many passes as the one with most.

        Collective where the ranks pass together, as the passes are: so ask before the first of them, or a rank with
        few passes waits here for one that waits for it there.

        Args:
            passes: that this rank has to make.
        """
        if self.together is None:
            return []
        most = int(self.together.max(torch.tensor(passes)))
        return [self.nothing() for _ in range(most - passes)]

    def nothing(self) -> PackedBatch:
        """A micro-batch whose loss and gradient are 0."""
        ids = [self.pad_token_id]
        return self.one([ScoredSequence(ids, ids, [0.0], advantage=0.0, weight=0.0)])

    @torch.no_grad()
    def with_old_logprobs(self, part: MiniBatch) -> MiniBatch:
        """Adds log pi_old to replayed sequences; a fresh one's behaviour policy is the policy before the update."""
        sequences = list(part.sequences)
        replayed = [index for index, sequence in enumerate(sequences) if sequence.replayed]
        plan = self._plan([sequences[index] for index in replayed])
        idle = self.idle(len(plan))
        for rows in plan:
            chosen = [replayed[row] for row in rows]
            packed = self.one([sequences[index] for index in chosen])
            logprobs, _ = score(self.policy, packed, self.temperature, with_entropy=False)
            sizes = [len(sequences[index].completion_ids) for index in chosen]
            for index, old in zip(chosen, logprobs.cpu().split(sizes), strict=True):
                sequences[index] = dataclasses.replace(sequences[index], old_logprobs=old.numpy())
        for packed in idle:
            score(self.policy, packed, self.temperature, with_entropy=False)
        return dataclasses.replace(part, sequences=sequences)

    def _plan(self, sequences: Sequence[ScoredSequence]) -> list[list[int]]:
        """Which sequences share a micro-batch."""
        if self._shares:
            return plan_packs(sequences, self.max_tokens)
        return plan_microbatches([len(sequence) for sequence in sequences], self.max_tokens)

    @property
    def _shares(self) -> bool:
        return self.share_prompts and can_share_prompts(self.policy)
