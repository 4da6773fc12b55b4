"""Plain GRPO's choice: the pool in a new random order, pass after pass."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from datamodules.pool import PromptPool
from datamodules.selectors.base import NOBODY, Ranker, SelectionContext
from datamodules.selectors.passes import Passes


class Uniform(Ranker):
    """Every prompt once per pass over the pool, in an order reshuffled for each pass.

    A choice that crosses the border of two passes takes what is left of the first; its own prompts come later in the
    second pass, so a choice never holds a prompt twice and every pass still covers the pool exactly. The order of a
    pass depends on (run seed, pass) only: reference draws do not change it. A prompt that a filter refuses has had its
    turn in the pass; one that is excluded or rests keeps it.
    """

    def __init__(self) -> None:
        super().__init__()
        self._turns = NOBODY
        """int64 `[Q]`: passes in which each prompt has had its turn."""
        self._passes: Passes | None = None

    def setup(self, pool: PromptPool, context: SelectionContext) -> None:
        super().setup(pool, context)
        self._turns = np.zeros(len(pool), dtype=np.int64)
        self._passes = Passes(context.seed, type(self).__name__, len(pool))

    def priorities(self, n: int, rng: np.random.Generator) -> np.ndarray:
        if self._passes is None:
            raise RuntimeError("Uniform is used before setup()")
        place = np.empty(len(self.pool))
        for number in range(int(self._turns.min()), int(self._turns.max()) + 1):
            now = self._turns == number
            place[now] = number * len(self.pool) + self._passes.ranks(number)[now]
        return -place

    def settle(self, chosen: np.ndarray, passed_over: np.ndarray = NOBODY) -> None:
        self._turns[np.union1d(chosen, passed_over)] += 1

    def metrics(self) -> dict[str, float]:
        return {"selection/pool_epoch": float(self._turns.mean())}

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"turns": torch.from_numpy(self._turns.copy())}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self._turns = state["turns"].numpy().copy()
