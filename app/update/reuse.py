"""Further updates on a batch, gated by the norm of the output head's gradient."""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass

import numpy as np

from datamodules.errors import UserError

_ENOUGH = 8
"""First updates that a norm is compared with, at least; before, batches are used once."""


@dataclass(frozen=True)
class Reuse:
    """Options of further updates on the informative groups of a batch: `num_iterations` of TRL, `ppo_epochs` of verl.

    With a threshold (DGG, arXiv 2605.19425) the gradient of a further update is taken unless the norm of its part in
    the output head is too large: its z-score among the first updates on the last 64 mini-batches is above the
    threshold. Log-probabilities before the first update stay the centre of the clip range. Further updates are no steps
    of `trainer.max_steps` and of the schedule.

    Args:
        passes: updates with each mini-batch, at most, the first included; 1 uses it once.
        threshold: z-score above which a batch is not used any more; null for no gate.
    """

    passes: int = 1
    threshold: float | None = 0.5

    def __post_init__(self) -> None:
        if self.passes < 1:
            raise UserError(f"model.reuse.passes is {self.passes}; set it to 1 or more.")
        if self.threshold is not None and not math.isfinite(self.threshold):
            raise UserError(f"model.reuse.threshold is {self.threshold}; set a number, or null for no gate.")


@dataclass(frozen=True, slots=True)
class Reused:
    """The further updates on a batch.

    Attributes:
        updates: number of further updates.
        groups: number of groups in all of them.
        z_score: that of the last gradient, taken or not; NaN without one.
    """

    updates: int = 0
    groups: int = 0
    z_score: float = math.nan


class HeadNorms:
    """Norms of the output head's gradient in the first updates on the last mini-batches."""

    def __init__(self) -> None:
        self.norms: deque[float] = deque(maxlen=64)

    def add(self, norm: float) -> None:
        """Add that of a first update, if it is finite."""
        if math.isfinite(norm):
            self.norms.append(norm)

    @property
    def known(self) -> bool:
        """Whether there are enough of them for a z-score."""
        return len(self.norms) >= _ENOUGH

    def z_score(self, norm: float) -> float:
        """Return the deviation of a norm from the mean, in standard deviations."""
        known = np.array(self.norms)
        return float((norm - known.mean()) / max(float(known.std(ddof=1)), 1e-12))
