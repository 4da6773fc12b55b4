"""Every prompt's own course: Ornstein-Uhlenbeck processes, each filtered given what its embedding says.

Given its level g, the course z has mean g, stationary variance `own` and correlation `exp(-gap / memory)` over a gap of
steps. The filter keeps `z | g ~ N(level + pull g, spread)`: Kalman's recursion is linear in g, so one pass serves every
g. What an outcome says about g itself is a Gaussian factor, handed to the shared part (`Message`). Both are exact for
Gaussian measurements.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from datamodules.posterior.constants import Constants


@dataclass(frozen=True, slots=True, eq=False)
class Conditional:
    """`z_i | g_i ~ N(level_i + pull_i g_i, spread_i)`; arrays `[N]`."""

    level: np.ndarray
    pull: np.ndarray
    spread: np.ndarray


@dataclass(frozen=True, slots=True, eq=False)
class Message:
    """What new measurements say about g: the factor `exp(shift_i g_i - precision_i g_i^2 / 2)`; arrays `[N]`."""

    precision: np.ndarray
    shift: np.ndarray


class History:
    """The own courses of a pool.

    Args:
        size: prompts `Q`.
        constants: of the model.
    """

    def __init__(self, size: int, constants: Constants) -> None:
        self.constants = constants
        self.level = np.zeros(size)
        self.pull = np.ones(size)
        self.spread = np.full(size, constants.own)
        self.last = np.full(size, -1, dtype=np.int64)
        """int64 `[Q]`: step of the latest outcome, -1 for none."""

    def now(self, step: int, positions: np.ndarray | slice = slice(None)) -> Conditional:
        """The courses at `step`, before any outcome of that step that has not been taken in yet."""
        gap = np.where(self.last[positions] < 0, 0, step - self.last[positions])
        kept = np.exp(-gap / self.constants.memory)
        return Conditional(
            kept * self.level[positions],
            kept * self.pull[positions] + (1 - kept),
            kept**2 * self.spread[positions] + (1 - kept**2) * self.constants.own,
        )

    def update(self, step: int, positions: np.ndarray, measured: np.ndarray, variance: np.ndarray) -> Message:
        """Takes in measurements `measured` of the courses at `positions`, distinct, with error variances `variance`."""
        now = self.now(step, positions)
        total = now.spread + variance
        gain = now.spread / total
        surprise = measured - now.level
        self.level[positions] = now.level + gain * surprise
        self.pull[positions] = now.pull * (1 - gain)
        self.spread[positions] = now.spread * (1 - gain)
        self.last[positions] = step
        return Message(now.pull**2 / total, now.pull * surprise / total)
