"""Plain GRPO's choice: the pool in a new random order, pass after pass."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from datamodules.pool import PromptPool
from datamodules.seeding import generator
from datamodules.selectors.base import SelectionContext, Selector


class Uniform(Selector):
    """Every prompt once per pass over the pool, in an order reshuffled for each pass.

    A choice that crosses the border of two passes takes what is left of the first; its own prompts come later in the
    second pass, so a choice never holds a prompt twice and every pass still covers the pool exactly. The order of a
    pass depends on (run seed, pass) only: reference draws do not change it.
    """

    def __init__(self) -> None:
        super().__init__()
        self._epoch = 0
        self._position = 0
        self._deferred = np.empty(0, dtype=np.int64)
        self._head = 0
        self._order = np.empty(0, dtype=np.int64)

    def setup(self, pool: PromptPool, context: SelectionContext) -> None:
        super().setup(pool, context)
        self._order = self._ordered()

    def select(self, n: int) -> np.ndarray:
        chosen = self._order[self._position : self._position + n]
        self._position += len(chosen)
        if len(chosen) == n:
            return chosen
        self._epoch, self._position = self._epoch + 1, n - len(chosen)
        self._deferred, self._head = chosen, self._position
        self._order = self._ordered()
        return np.concatenate([chosen, self._order[: self._position]])

    def _ordered(self) -> np.ndarray:
        """This pass's order: none of `_deferred` among its first `_head` prompts."""
        rng = generator(self.context.seed, type(self).__name__, "pass", self._epoch)
        order = rng.permutation(len(self.pool))
        allowed = order[~np.isin(order, self._deferred)][: self._head]
        return np.concatenate([allowed, order[~np.isin(order, allowed)]])

    def metrics(self) -> dict[str, float]:
        return {"selection/pool_epoch": self._epoch + self._position / len(self.pool)}

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {
            "epoch": self._epoch,
            "position": self._position,
            "deferred": torch.from_numpy(self._deferred.copy()),
            "head": self._head,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self._epoch, self._position, self._head = state["epoch"], state["position"], state["head"]
        self._deferred = state["deferred"].numpy()
        self._order = self._ordered()
