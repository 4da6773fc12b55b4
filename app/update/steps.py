"""The optimizer steps of a batch: gradients added up over micro-batches, clipped, left out where not finite."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch.strategies import ParallelStrategy
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from app.objective.packing import PackedBatch
from app.objective.statistics import Statistics
from app.objective.surrogate import PolicyLoss
from app.policy.sharding import own_part
from app.ranks import Ranks, talking
from app.update.gradient_sum import sum_gradients
from app.update.minibatch import CompletionId, MiniBatch
from app.update.nonfinite import NonFiniteGuard, offenders

if TYPE_CHECKING:
    from app.module import GRPOModule

_NOTHING_TO_LEARN = (
    "no completion of a batch had an advantage: rewards were equal within every group, so the weights stayed as they "
    "were. Look at reward_std and frac_reward_zero_std, and count such updates by updates/empty (said once)."
)


@dataclass(frozen=True, slots=True)
class TokensRead:
    """What the forward passes of an update cost.

    Attributes:
        positions: that the model computed, padding included.
        tokens: without padding.
        sequence_tokens: of prompts and completions, had every completion its own copy of its prompt.
    """

    positions: int = 0
    tokens: int = 0
    sequence_tokens: int = 0

    def plus(self, packed: PackedBatch) -> TokensRead:
        """With one more micro-batch."""
        return TokensRead(
            self.positions + packed.input_ids.numel(),
            self.tokens + packed.real_tokens,
            self.sequence_tokens + packed.sequence_tokens,
        )


@dataclass(frozen=True, slots=True, eq=False)
class Seen:
    """Over the micro-batches of a mini-batch.

    Attributes:
        loss: scalar, their sum: the mini-batch's.
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
        """Before the first micro-batch."""
        return cls(torch.zeros((), device=device), Statistics.empty(device), Statistics.empty(device), TokensRead())

    def plus(self, packed: PackedBatch, found: PolicyLoss) -> Seen:
        """With one more micro-batch and its loss."""
        return Seen(
            self.loss + found.loss.detach(),
            self.all.merge(found.statistics),
            self.replayed.merge(found.terms.statistics(packed.replayed)),
            self.read.plus(packed),
        )

    def over(self, ranks: Ranks) -> Seen:
        """With what the other ranks have seen."""
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
        seen: by its forward passes, those of all ranks.
        grad_norm: scalar, before clipping.
        skipped: whether loss or gradient was not finite, so that the weights were left alone.
    """

    seen: Seen
    grad_norm: Tensor
    skipped: bool


class Updates:
    """Takes the optimizer steps of a module.

    Every rank takes every step, with the same gradient: also one that has no sequence of a mini-batch.

    Args:
        module: gives the loss, and the trainer whose strategy and optimizer are used.
    """

    def __init__(self, module: GRPOModule) -> None:
        self._module = module
        self._nonfinite = NonFiniteGuard()

    @property
    def diverged(self) -> bool:
        """Whether updates are not finite any more."""
        return self._nonfinite.exhausted

    def check(self, step: int) -> None:
        """Raises UserError when they are not."""
        self._nonfinite.check(step)

    def take(self, parts: Sequence[MiniBatch], shares: Sequence[MiniBatch], step: int) -> list[Update]:
        """One optimizer step for each mini-batch of the batch `step`.

        Args:
            parts: the mini-batches, the same on all ranks.
            shares: of each the sequences that this rank passes over.
            step: of the batch.
        """
        if not any(part.sequences for part in parts):
            rank_zero_warn(_NOTHING_TO_LEARN)
        return [self._take(part, share, step) for part, share in zip(parts, shares, strict=True)]

    def _take(self, part: MiniBatch, share: MiniBatch, step: int) -> Update:
        module = self._module
        optimizer: Any = module.optimizers()
        scheduler: Any = module.lr_schedulers()
        optimizer.zero_grad(set_to_none=True)
        if module.sharding is not None:
            # The passes are collectives: who is lost is found out before.
            module.ranks.meet("update")
        seen = self._accumulate(share).over(module.ranks)
        if module.sharding is None:
            sum_gradients([one for one in module.policy_model.parameters() if one.requires_grad], module.ranks)
        norm = module.optimization.clip(module.policy_model)
        # The same on all ranks, as loss and norm are.
        finite = bool(torch.isfinite(seen.loss) & torch.isfinite(norm))
        if not finite:
            module.zero_grad(set_to_none=True)
            self._nonfinite.skipped(step, seen.loss, norm, self._offenders(share))
        elif part.sequences:
            self._nonfinite.passed()
        # Without gradients (nothing to learn, or not finite) AdamW leaves every weight alone, and the schedule and
        # Lightning's step counter still advance.
        optimizer.step()
        scheduler.step()
        return Update(seen, norm, skipped=not finite)

    def _accumulate(self, share: MiniBatch) -> Seen:
        seen, module = Seen.nothing(self._module.device), self._module
        with self._apart(), talking("update"):
            packs = module.microbatches_of(share.sequences)
            idle = module.microbatches.idle(len(packs))
            for packed in packs:
                found = module.loss_of(packed)
                module.manual_backward(found.loss)
                seen = seen.plus(packed, found)
            for packed in idle:
                module.manual_backward(module.loss_of(packed).loss)
        return seen

    def _apart(self) -> AbstractContextManager[None]:
        """Without DDP's reduction in the backward pass: see `gradient_sum`."""
        strategy = self._module.trainer.strategy
        return strategy.block_backward_sync() if isinstance(strategy, ParallelStrategy) else nullcontext()

    def _offenders(self, share: MiniBatch) -> list[CompletionId]:
        """The completions that made an update not finite, of all ranks."""
        module = self._module
        trained = [parameter for parameter in module.policy_model.parameters() if parameter.requires_grad]
        if module.sharding is None:
            mine = offenders(share, lambda sequence: module.loss_of(module.microbatches.one([sequence])).loss, trained)
        else:
            mine = self._offenders_of_sharded(share, trained)
        named = module.ranks.gather(json.dumps([[one.prompt_id, one.sample] for one in mine]).encode(), "update")
        return [CompletionId(*one) for names in named for one in json.loads(names)]

    def _offenders_of_sharded(self, share: MiniBatch, trained: Sequence[torch.nn.Parameter]) -> list[CompletionId]:
        """Those of this rank, where gradients are known only summed over ranks: all others pass over nothing."""
        module, ranks = self._module, self._module.ranks
        counts = [int(count) for count in ranks.gather(str(len(share.sequences)).encode(), "update")]
        found = []
        for rank, count in enumerate(counts):
            for row in range(count):
                ours = rank == ranks.rank
                micro = module.microbatches
                packed = micro.one([share.sequences[row]]) if ours else micro.nothing()
                loss = module.loss_of(packed).loss
                module.manual_backward(loss)
                parts = [loss.detach(), *(own_part(one.grad) for one in trained if one.grad is not None)]
                finite = all(bool(torch.isfinite(part).all()) for part in parts)
                module.zero_grad(set_to_none=True)
                if ranks.any(not finite) and ours:
                    found.append(share.ids[row])
        return found
