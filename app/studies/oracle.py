"""The ceiling of a recorded-run study: a selector that is told what every prompt showed, chosen or not."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from datamodules.pool import PromptPool
from datamodules.selectors import Ranker, SelectionContext
from datamodules.types import Outcomes


class Oracle(Ranker):
    """Takes the prompts whose past is nearest to a success rate of 0.5, given the past of all of them.

    Its forecast is the exponentially decayed mean of a prompt's rates at the visits before, so it still has to see
    through the binomial noise of each of them and does not know the visit to come. Before the first outcome the choice
    is uniform and there is no forecast. For studies only: no run can afford to roll out every prompt at every step.

    Args:
        decay: weight of a visit relative to the one after it, in [0, 1]; 0 is the visit before alone. On the recorded
            run of 1209 questions 0.7 to 0.9 do equally well, 0 loses 4 points of informative share.
    """

    def __init__(self, decay: float = 0.8) -> None:
        super().__init__()
        self.decay = decay
        self._weight = np.empty(0)
        self._sum = np.empty(0)

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

    def state_dict(self) -> dict[str, Any]:
        state = {"weight": torch.from_numpy(self._weight.copy()), "sum": torch.from_numpy(self._sum.copy())}
        return super().state_dict() | state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self._weight, self._sum = state["weight"].numpy().copy(), state["sum"].numpy().copy()
