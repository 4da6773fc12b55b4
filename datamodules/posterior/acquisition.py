"""Which prompts are worth a group now: what it teaches the policy, plus what it teaches the selector."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from datamodules.posterior.table import BeliefTable, Cells


@dataclass(frozen=True, slots=True)
class Acquisition:
    """Priority = P(informative) + `lookahead` x improvement + weight x forecast variance removed.

    The first term is what greedy choice maximises: the probability that the group teaches the policy at all, integrated
    over the belief. The second is the knowledge gradient (Frazier, Powell & Dayanik 2008, "A knowledge-gradient policy
    for sequential information collection"): by how much one group is expected to raise the prompt's P(informative)
    above that of the last prompt that would be chosen without it, times the steps over which such a find is used. It
    vanishes as soon as enough good prompts are known, so exploration pays for itself, whatever the size of the pool.
    The third pays for knowing the pool, which is what the forecasts are for: the share of the pool's prior variance of
    success rates that one group removes, worth `knowledge / step` times a batch. Its decay with the step is that of
    epsilon-greedy exploration with logarithmic regret (Auer, Cesa-Bianchi & Fischer 2002, "Finite-time analysis of the
    multiarmed bandit problem", theorem 3). Approximate in that every prompt is judged as if it were chosen alone, and
    that what it says about other prompts is not counted.

    Both factors count steps in which something learnt is used, so what is forgotten after `memory` steps cuts them:
    a factor h becomes 1 / (1 / h + 1 / memory).

    Attributes:
        lookahead: steps over which a prompt found to be informative is expected to be used, if it stays so.
        knowledge: batches of informative prompts that lasting knowledge of the whole pool would be worth at the first
            step.
    """

    lookahead: float = 16.0
    knowledge: float = 110.0

    def greedy(self, table: BeliefTable, cells: Cells) -> np.ndarray:
        """float64 `[Q]`: P(informative)."""
        return cells.read(table.informative)

    def priorities(
        self, table: BeliefTable, cells: Cells, prior_variance: float, memory: float, n: int, step: int
    ) -> np.ndarray:
        """float64 `[Q]`.

        Args:
            table: for the run's group size.
            cells: the pool's beliefs.
            prior_variance: mean variance of the success rates of prompts before their first group.
            memory: steps after which a prompt's own course has forgotten most of where it was, > 0.
            n: prompts to be chosen.
            step: steps begun, this one included, >= 1.
        """
        informative = self.greedy(table, cells)
        size = len(informative)
        threshold = float(np.partition(informative, size - n)[size - n]) if 0 < n <= size else 1.0
        weight = _lasting(self.knowledge, memory) / step * n / size / max(prior_variance, 1e-12)
        bonus = _lasting(self.lookahead, memory) * table.improvement(threshold) + weight * table.removed
        return informative + cells.read(bonus)


def _lasting(steps: float, memory: float) -> float:
    """Half the harmonic mean of the two: nearly the smaller one."""
    return steps * memory / (steps + memory)
