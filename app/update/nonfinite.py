"""Updates whose loss or gradient is not finite: they are skipped, and three in a row end the run."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from app.objective.packing import ScoredSequence
from app.policy.sharding import own_part
from app.update.learner import Learner
from app.update.minibatch import CompletionId, MiniBatch
from datamodules.errors import UserError

logger = logging.getLogger(__name__)

LIMIT = 3
"""Consecutive updates that may be skipped before the run ends: one or two are an accident, three a broken run."""
_SHOWN = 8


class NonFiniteGuard:
    """Counts consecutive updates that were not finite, and reports the completions that caused them."""

    def __init__(self) -> None:
        self._in_a_row = 0
        self._last = ""

    @property
    def exhausted(self) -> bool:
        """Whether the run should end."""
        return self._in_a_row >= LIMIT

    def passed(self) -> None:
        """Record a finite update."""
        self._in_a_row = 0

    def skipped(self, step: int, loss: Tensor, norm: Tensor, offenders: Sequence[CompletionId]) -> None:
        """Record a skipped update, and log the completions that caused it."""
        self._in_a_row += 1
        source = "each completion alone is finite"
        if offenders:
            more = f" and {len(offenders) - _SHOWN} more" if len(offenders) > _SHOWN else ""
            source = "from " + ", ".join(map(str, offenders[:_SHOWN])) + more
        self._last = f"loss {float(loss):.4g}, gradient norm {float(norm):.4g}, {source}"
        logger.warning("step %d: update skipped, not finite: %s", step, self._last)

    def check(self, step: int) -> None:
        """Raise UserError if the last `LIMIT` updates were skipped."""
        if self.exhausted:
            raise UserError(
                f"Stopped at step {step}: {LIMIT} updates in a row were not finite (last: {self._last}). The "
                "checkpoint has the weights before them: resume with a lower model.optimization.learning_rate, a "
                "smaller model.surrogate.importance_cap or --trainer.precision 32-true."
            )


def nonfinite_completions(learner: Learner, share: MiniBatch, backward: Callable[[Tensor], None]) -> list[CompletionId]:
    """Return the completions of all ranks' shares whose own loss or gradient is not finite. Collective.

    It costs one forward and backward pass per completion; only a sharded policy needs `backward`.
    """
    if learner.sharded:
        found = _sharded_offenders(learner, share, backward)
    else:
        found = offenders(share, lambda one: learner.loss_of(learner.microbatches.one([one])).loss, learner.trained)
    payload = json.dumps([[one.prompt_id, one.sample] for one in found]).encode()
    return [CompletionId(*one) for ids in learner.ranks.gather(payload, "update") for one in json.loads(ids)]


def offenders(
    part: MiniBatch, loss_of: Callable[[ScoredSequence], Tensor], parameters: Sequence[torch.nn.Parameter]
) -> list[CompletionId]:
    """Return the completions whose own loss or gradient is not finite, without touching `Parameter.grad`."""

    def finite(sequence: ScoredSequence) -> bool:
        loss = loss_of(sequence)
        gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
        return all(bool(torch.isfinite(one).all()) for one in (loss, *gradients) if one is not None)

    return [name for name, sequence in zip(part.ids, part.sequences, strict=True) if not finite(sequence)]


def _sharded_offenders(learner: Learner, share: MiniBatch, backward: Callable[[Tensor], None]) -> list[CompletionId]:
    """Return this rank's offenders under a sharded policy.

    Gradients are summed over ranks there, so one rank at a time passes a completion while the others pass nothing.
    """
    ranks, micro, trained = learner.ranks, learner.microbatches, learner.trained
    counts = [int(count) for count in ranks.gather(str(len(share.sequences)).encode(), "update")]
    found = []
    for rank, count in enumerate(counts):
        for row in range(count):
            ours = rank == ranks.rank
            loss = learner.loss_of(micro.one([share.sequences[row]]) if ours else micro.nothing()).loss
            backward(loss)
            parts = [loss.detach(), *(own_part(one.grad) for one in trained if one.grad is not None)]
            finite = all(bool(torch.isfinite(part).all()) for part in parts)
            learner.policy.zero_grad(set_to_none=True)
            if ranks.any(not finite) and ours:
                found.append(share.ids[row])
    return found
