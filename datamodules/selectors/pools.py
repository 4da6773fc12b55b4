"""Difficulty pools: prompts weighted by the result of their last group (prime-rl's rule)."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from datamodules.errors import UserError
from datamodules.pool import PromptPool
from datamodules.selectors.base import Ranker, SelectionContext
from datamodules.selectors.sampling import gumbel
from datamodules.types import Outcomes


class Pools(Ranker):
    """Draws prompts without replacement, weighted by each prompt's last success rate (prime-rl draws with replacement).

    A rate <= `hard_up_to` is hard, one <= `normal_up_to` normal, one above easy. Positive weights keep every prompt
    eligible; removing prompts for good would drain the pool as the policy improves.

    Args:
        hard_up_to: highest success rate that counts as hard, in [0, 1].
        normal_up_to: highest success rate that counts as normal, in [hard_up_to, 1].
        hard: weight of hard prompts, >= 0.
        normal: weight of normal prompts, >= 0.
        easy: weight of easy prompts, >= 0.
        unseen: weight of prompts without an outcome, >= 0.
    """

    def __init__(
        self,
        hard_up_to: float = 0.25,
        normal_up_to: float = 0.75,
        hard: float = 0.2,
        normal: float = 1.0,
        easy: float = 0.2,
        unseen: float = 1.0,
    ) -> None:
        super().__init__()
        if not 0 <= hard_up_to <= normal_up_to <= 1:
            raise UserError(
                f"hard_up_to={hard_up_to} and normal_up_to={normal_up_to} are out of order, expected "
                "0 <= hard_up_to <= normal_up_to <= 1. Change one of them."
            )
        if min(hard, normal, easy, unseen) < 0 or max(hard, normal, easy, unseen) == 0:
            raise UserError(
                f"hard={hard}, normal={normal}, easy={easy} and unseen={unseen} are not usable weights, expected all "
                ">= 0 and at least one above 0. Change them."
            )
        self.bounds = np.array([hard_up_to, normal_up_to])
        self.weights = np.array([hard, normal, easy, unseen], dtype=np.float64)
        self._rates = np.empty(0)
        """float64 `[Q]`: last success rate, NaN before the first."""

    def setup(self, pool: PromptPool, context: SelectionContext) -> None:
        super().setup(pool, context)
        self._rates = np.full(len(pool), np.nan)

    def _classes(self) -> np.ndarray:
        """Return int64 `[Q]`: 0 hard, 1 normal, 2 easy, 3 unseen."""
        return np.where(np.isnan(self._rates), 3, np.searchsorted(self.bounds, self._rates, side="left"))

    def priorities(self, n: int, rng: np.random.Generator) -> np.ndarray:
        with np.errstate(divide="ignore"):
            logits = np.log(self.weights)
        return gumbel(logits[self._classes()], rng)

    def learn(self, positions: np.ndarray, outcomes: Outcomes) -> None:
        self._rates[positions] = outcomes.success_rate

    def metrics(self) -> dict[str, float]:
        shares = np.bincount(self._classes(), minlength=4) / len(self._rates)
        names = ("hard", "normal", "easy", "unseen")
        return {f"selection/{name}_fraction": float(share) for name, share in zip(names, shares, strict=True)}

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"rates": torch.from_numpy(self._rates.copy())}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self._rates = state["rates"].numpy().copy()
