"""When a loss or gradient is not finite: the update is left out, its completions named; three in a row end the run."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from app.objective.packing import ScoredSequence
from app.update.minibatch import CompletionId, MiniBatch
from datamodules.errors import UserError

logger = logging.getLogger(__name__)

LIMIT = 3
"""Updates in a row that may be left out before the run ends: one or two are an accident, three a broken run."""
_SHOWN = 8


class NonFiniteGuard:
    """Counts updates whose loss or gradient was not finite, and says which completions they came from."""

    def __init__(self) -> None:
        self._in_a_row = 0
        self._last = ""

    @property
    def exhausted(self) -> bool:
        """Whether the run should end."""
        return self._in_a_row >= LIMIT

    def passed(self) -> None:
        """An update was finite."""
        self._in_a_row = 0

    def skipped(self, step: int, loss: Tensor, norm: Tensor, offenders: Sequence[CompletionId]) -> None:
        """An update was left out."""
        self._in_a_row += 1
        self._last = f"loss {float(loss):.4g}, gradient norm {float(norm):.4g}, {_named(offenders)}"
        logger.warning("step %d: update left out, not finite: %s", step, self._last)

    def check(self, step: int) -> None:
        """Ends the run when it should.

        Raises:
            UserError: the last `LIMIT` updates were left out.
        """
        if self.exhausted:
            raise UserError(
                f"stopped at step {step}: {LIMIT} updates in a row were not finite (the last: {self._last}); the "
                "weights before them are in the checkpoint: resume with a lower model.optimization.learning_rate, "
                "a smaller model.surrogate.importance_cap or --trainer.precision 32-true"
            )


def offenders(
    part: MiniBatch, loss_of: Callable[[ScoredSequence], Tensor], parameters: Sequence[torch.nn.Parameter]
) -> list[CompletionId]:
    """Those completions of a mini-batch whose loss or gradient is not finite by itself.

    Costs one forward and backward pass per completion, and leaves the parameters' gradients alone.

    Args:
        part: the mini-batch whose update was left out.
        loss_of: the loss of one completion, with gradient.
        parameters: the trained ones.
    """

    def finite(sequence: ScoredSequence) -> bool:
        loss = loss_of(sequence)
        gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
        return all(bool(torch.isfinite(one).all()) for one in (loss, *gradients) if one is not None)

    return [name for name, sequence in zip(part.ids, part.sequences, strict=True) if not finite(sequence)]


def _named(offenders: Sequence[CompletionId]) -> str:
    if not offenders:
        return "each completion finite by itself"
    more = f" and {len(offenders) - _SHOWN} more" if len(offenders) > _SHOWN else ""
    return "from " + ", ".join(map(str, offenders[:_SHOWN])) + more
