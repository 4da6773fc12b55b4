"""The ceiling of a recorded-run study: a selector that sees every prompt's outcomes, chosen or not."""

from __future__ import annotations

import numpy as np

from datamodules.pool import PromptPool
from datamodules.selectors import Ranker, SelectionContext
from datamodules.types import Outcomes


class Oracle(Ranker):
    """Chooses the prompts whose past is nearest to a success rate of 0.5, given the past of all prompts.

    Its forecast is the exponentially decayed mean of a prompt's rates at earlier visits, so it still has to average out
    their binomial noise and does not know the next visit. Before the first outcome the choice is uniform and there is
    no forecast. It is for studies only, because no run can roll out every prompt at every step.

    Args:
        decay: weight of a visit relative to the one after it, in [0, 1]; 0 uses the last visit alone.
    """

    def __init__(self, decay: float = 0.8) -> None:
        super().__init__()
        self.decay = decay

    def setup(self, pool: PromptPool, context: SelectionContext) -> None:
        super().setup(pool, context)
        self._weight, self._sum = np.zeros(len(pool)), np.zeros(len(pool))

    def priorities(self, n: int, rng: np.random.Generator) -> np.ndarray:
        expected = self.forecast()
        return np.zeros(len(self.pool)) if expected is None else -np.abs(expected - 0.5)

    def learn(self, positions: np.ndarray, outcomes: Outcomes) -> None:
        self._weight[positions] = self.decay * self._weight[positions] + 1
        self._sum[positions] = self.decay * self._sum[positions] + outcomes.success_rate

    def forecast(self) -> np.ndarray | None:
        return self._sum / self._weight if self._weight.all() else None
