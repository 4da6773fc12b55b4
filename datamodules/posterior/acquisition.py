"""The value of a group for the policy and for the selector."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from datamodules.posterior.table import BeliefTable, Cells

HORIZON = 300.0
"""Steps for which knowledge is used at most."""


@dataclass(frozen=True, slots=True)
class Acquisition:
    """Priority = P(informative) + improvement + weight x removed forecast variance.

    - P(informative), integrated over the belief, is the probability that the group teaches the policy anything. A
      greedy choice maximises it alone.
    - The improvement is the knowledge gradient (Frazier, Powell & Dayanik 2008, "A knowledge-gradient policy for
      sequential information collection"): the expected increase of the prompt's P(informative) above that of the last
      prompt of a greedy choice, in the next step. It vanishes once enough good prompts are known.
    - The removed variance is the share of the pool's prior variance of success rates that one group removes. To know
      the whole pool is worth `forecast_value` batches for every step in which the knowledge lasts. It is divided by the
      steps so far, the decay of epsilon-greedy exploration with logarithmic regret (Auer, Cesa-Bianchi & Fischer 2002,
      "Finite-time analysis of the multiarmed bandit problem", theorem 3), so that it ends by itself.

    Knowledge lasts 1 / (1 / HORIZON + 1 / memory) steps, so what will soon be forgotten is not worth exploring. Two
    approximations: every prompt is valued as if it were chosen alone, and its information about other prompts is not
    counted.

    Attributes:
        forecast_value: worth of a forecast that knows the whole pool, as a share of a batch of informative groups per
            step; 0 explores only what pays for itself.
    """

    forecast_value: float = 0.39

    def priorities(
        self, table: BeliefTable, cells: Cells, prior_variance: float, memory: float, n: int, step: int
    ) -> np.ndarray:
        """Return float64 `[Q]` priorities.

        Args:
            table: table for the run's group size.
            cells: places of the pool's beliefs.
            prior_variance: mean variance of the success rates of prompts before their first group.
            memory: steps after which a prompt's own course is mostly forgotten, > 0.
            n: number of prompts to choose.
            step: training steps so far, this one included, >= 1.
        """
        informative = cells.read(table.informative)
        size = len(informative)
        threshold = float(np.partition(informative, size - n)[size - n]) if 0 < n <= size else 1.0
        lifetime = HORIZON * memory / (HORIZON + memory)
        weight = self.forecast_value * lifetime / step * n / size / max(prior_variance, 1e-12)
        bonus = table.improvement(threshold) + weight * table.removed
        return informative + cells.read(bonus)
