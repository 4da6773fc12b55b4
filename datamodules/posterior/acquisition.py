"""The value of a group for the policy and for the selector."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from datamodules.posterior.table import BeliefTable, Cells


@dataclass(frozen=True, slots=True)
class Acquisition:
    """Priority = P(informative) + `lookahead` x improvement + weight x removed forecast variance.

    - P(informative), integrated over the belief, is the probability that the group teaches the policy anything. A
      greedy choice maximises it alone.
    - The improvement is the knowledge gradient (Frazier, Powell & Dayanik 2008, "A knowledge-gradient policy for
      sequential information collection"): the expected increase of the prompt's P(informative) above that of the last
      prompt of a greedy choice, times the steps for which such a find is used. It vanishes once enough good prompts are
      known, so exploration pays for itself at any pool size.
    - The removed variance is the share of the pool's prior variance of success rates that one group removes. Knowing
      the pool is worth `knowledge / step` batches; this decay is that of epsilon-greedy exploration with logarithmic
      regret (Auer, Cesa-Bianchi & Fischer 2002, "Finite-time analysis of the multiarmed bandit problem", theorem 3).

    Two approximations: every prompt is valued as if it were chosen alone, and its information about other prompts is
    not counted. As knowledge is forgotten after `memory` steps, a factor h becomes 1 / (1 / h + 1 / memory).

    Attributes:
        lookahead: steps for which a prompt found to be informative is expected to be used.
        knowledge: value of lasting knowledge of the whole pool at the first step, in batches of informative prompts.
    """

    lookahead: float = 16.0
    knowledge: float = 110.0

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
        lookahead, knowledge = (steps * memory / (steps + memory) for steps in (self.lookahead, self.knowledge))
        weight = knowledge / step * n / size / max(prior_variance, 1e-12)
        bonus = lookahead * table.improvement(threshold) + weight * table.removed
        return informative + cells.read(bonus)
