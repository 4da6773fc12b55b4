"""Uniform selection, as in plain GRPO: shuffled passes over the pool."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from datamodules.pool import PromptPool
from datamodules.selectors.base import NO_PROMPTS, Ranker, SelectionContext
from datamodules.selectors.sampling import pass_ranks


class Uniform(Ranker):
    """Chooses every prompt once per pass over the pool, reshuffled for each pass.

    A choice that crosses from one pass into the next takes the rest of the first and moves its own prompts back in the
    second: no choice repeats a prompt and every pass covers the pool exactly. The order depends on the run's seed and
    the pass only, not on reference draws. A prompt that a filter refuses has had its turn; one that is excluded or
    cooling down keeps it.
    """

    def __init__(self) -> None:
        super().__init__()
        self._turns: np.ndarray
        """int64 `[Q]`: passes in which each prompt has had its turn."""

    def setup(self, pool: PromptPool, context: SelectionContext) -> None:
        super().setup(pool, context)
        self._turns = np.zeros(len(pool), dtype=np.int64)

    def priorities(self, n: int, rng: np.random.Generator) -> np.ndarray:
        size = len(self.pool)
        place = np.empty(size)
        for number in np.unique(self._turns).tolist():  # the sources of a mixture may be many passes apart
            now = self._turns == number
            place[now] = number * size + pass_ranks(self._seed, type(self).__name__, number, size)[now]
        return -place

    def settle(self, chosen: np.ndarray, passed_over: np.ndarray = NO_PROMPTS) -> None:
        self._turns[np.union1d(chosen, passed_over)] += 1

    def metrics(self) -> dict[str, float]:
        return {"selection/pool_epoch": float(self._turns.mean())}

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"turns": torch.from_numpy(self._turns.copy())}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self._turns = state["turns"].numpy().copy()
