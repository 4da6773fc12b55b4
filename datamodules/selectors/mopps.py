"""MoPPS: Thompson sampling from a Beta posterior per prompt (Qu et al. 2025, arXiv 2507.04632)."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from datamodules.errors import UserError
from datamodules.pool import PromptPool
from datamodules.selectors.base import NO_PROMPTS, Ranker, SelectionContext
from datamodules.selectors.sampling import pass_ranks
from datamodules.types import Outcomes


class Mopps(Ranker):
    """Chooses the candidates whose sampled success rate is nearest to the target.

    The candidates are the next prompts of the shuffled pool. An outcome updates a prompt's posterior to
    Beta(lambda a + (1 - lambda) a0 + successes, lambda b + (1 - lambda) b0 + failures). If filters leave too few
    candidates, the prompts that follow them are used. Every choice, also a refill, moves on to new candidates.

    Args:
        target: success rate to aim at, in [0, 1].
        decay: lambda in [0, 1], the share of the past that a new outcome keeps; 1 forgets nothing.
        prior_successes: a0 > 0.
        prior_failures: b0 > 0.
        candidates: candidates per chosen prompt (8 to 16 in the paper); 0 makes the whole pool candidates.
    """

    def __init__(
        self,
        target: float = 0.5,
        decay: float = 1.0,
        prior_successes: float = 1.0,
        prior_failures: float = 1.0,
        candidates: int = 16,
    ) -> None:
        super().__init__()
        if not 0 <= target <= 1:
            raise UserError(f"target is {target}, expected a success rate in [0, 1]. Use 0.5 for informative prompts.")
        if not 0 <= decay <= 1:
            raise UserError(f"decay is {decay}, expected lambda in [0, 1]. Use 1 to forget nothing.")
        if not (prior_successes > 0 and prior_failures > 0):
            raise UserError(
                f"prior_successes={prior_successes} and prior_failures={prior_failures} are not a Beta prior, expected "
                "both > 0. Use 1 for both."
            )
        if candidates < 0:
            raise UserError(
                f"candidates is {candidates}, expected a number per chosen prompt >= 0. Use 0 for the whole pool."
            )
        self.target, self.decay = target, decay
        self.prior = np.array([prior_successes, prior_failures])
        self.candidates = candidates
        self._counts: np.ndarray
        """float64 `[2, Q]`: a and b of every prompt."""
        self._met = 0
        """Places that earlier choices have used up in the endless sequence of shuffled passes."""

    def setup(self, pool: PromptPool, context: SelectionContext) -> None:
        super().setup(pool, context)
        self._counts = np.repeat(self.prior[:, None], len(pool), axis=1)

    def priorities(self, n: int, rng: np.random.Generator) -> np.ndarray:
        size, method = len(self.pool), type(self).__name__
        number, within = divmod(self._met, size)
        # How many places lie before each prompt's next one.
        ahead = pass_ranks(self._seed, method, number, size)
        if within:
            following = pass_ranks(self._seed, method, number + 1, size) + size
            ahead = np.where(ahead >= within, ahead, following) - within
        near = np.flatnonzero(ahead < self._window(n))
        values = -1.0 - ahead
        values[near] = -np.abs(rng.beta(*self._counts[:, near]) - self.target)
        return values

    def settle(self, chosen: np.ndarray, passed_over: np.ndarray = NO_PROMPTS) -> None:
        self._met += self._window(len(chosen))

    def _window(self, n: int) -> int:
        return min(self.candidates * n, len(self.pool)) if self.candidates else len(self.pool)

    def learn(self, positions: np.ndarray, outcomes: Outcomes) -> None:
        successes = outcomes.success_rate * outcomes.samples
        seen = np.stack([successes, outcomes.samples - successes])
        kept = self.decay * self._counts[:, positions] + (1 - self.decay) * self.prior[:, None]
        # A shaped correctness reward may leave [0, 1], Beta counts must not.
        self._counts[:, positions] = kept + np.clip(seen, 0, outcomes.samples)

    def forecast(self) -> np.ndarray:
        return self._counts[0] / self._counts.sum(0)

    def forecast_deviation(self) -> np.ndarray:
        mean = self.forecast()
        return np.sqrt(mean * (1 - mean) / (self._counts.sum(0) + 1))

    def metrics(self) -> dict[str, float]:
        return {
            "selection/posterior_mean": float(self.forecast().mean()),
            "selection/posterior_std": float(self.forecast_deviation().mean()),
        }

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"counts": torch.from_numpy(self._counts.copy()), "met": self._met}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self._counts, self._met = state["counts"].numpy().copy(), state["met"]
