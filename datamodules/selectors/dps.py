"""DPS: every prompt's progress as a hidden Markov model (Mao et al. 2026, arXiv 2603.10887)."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from datamodules.errors import UserError
from datamodules.pool import PromptPool
from datamodules.selectors.base import Ranker, SelectionContext
from datamodules.types import REWARD_TOLERANCE, Outcomes

WRONG, PARTLY, RIGHT = 0, 1, 2


class Dps(Ranker):
    """Takes the prompts with the largest probability of being partly right now.

    Three states: all wrong, partly right, all right. Every prompt has its own Dirichlet counts of transitions, whose
    mean is its transition matrix. At every training step each belief goes one transition ahead. A measured group shows
    its state exactly: the belief becomes certain, and the transition that led there is counted, spread over the states
    it may have come from by their posterior probability. Also at every step, all counts fall back towards the prior:
    counts <- lambda counts + (1 - lambda) prior (+ what was counted in that step). This is the paper's filter in the
    order in which the authors' code applies it; their candidates are part of the pool, here they are all of it.

    A prompt measured twice in a step (reference rollouts follow the step's own) keeps the later state and one
    transition. The forecast is ours: P(all right) + P(partly right) times the mean rate of all partly right groups
    seen so far (0.5 before the first).

    Args:
        decay: lambda, in [0, 1]: the share of the counts that a step leaves standing (0.9 to 0.99 in the paper, 0.7 in
            its script for MATH).
        prior: Dirichlet count of every transition before any is seen, > 0.
    """

    def __init__(self, decay: float = 0.9, prior: float = 1.0) -> None:
        super().__init__()
        if not 0 <= decay <= 1:
            raise UserError(f"decay is {decay}, expected lambda in [0, 1]: 0.9 to 0.99 are usual")
        if not prior > 0:
            raise UserError(f"prior is {prior}, expected a count > 0 for every transition: 1 is usual")
        self.decay, self.prior = decay, prior
        self._counts = np.empty((3, 3, 0))
        """float64 `[3, 3, Q]`: Dirichlet counts of the transitions to (first) from (second) each state."""
        self._belief = np.empty((3, 0))
        """float64 `[3, Q]`: probability of each state in this step, given what was seen up to now."""
        self._before = np.empty((3, 0))
        """float64 `[3, Q]`: the same for the step before."""
        self._seen = np.empty(0, dtype=bool)
        """bool `[Q]`: measured in this step."""
        self._partly_rates = 0.0
        self._partly_groups = 0

    def setup(self, pool: PromptPool, context: SelectionContext) -> None:
        super().setup(pool, context)
        self._counts = np.full((3, 3, len(pool)), float(self.prior))
        self._belief = np.full((3, len(pool)), 1 / 3)
        self._before = self._belief.copy()
        self._seen = np.zeros(len(pool), dtype=bool)

    def begin_step(self) -> None:
        super().begin_step()
        measured = np.flatnonzero(self._seen)
        kept = self._counts[:, :, measured]
        self._forget(slice(None))
        self._counts[:, :, measured] = kept  # theirs were renewed when they were measured
        self._seen[:] = False
        self._before = self._belief
        # Sum over the state come from, as a loop of three: an [3, 3, Q] transition matrix is not kept.
        self._belief = sum(self._counts[:, i] * (self._before[i] / self._counts[:, i].sum(0)) for i in range(3))
        self._belief /= self._belief.sum(0)

    def _forget(self, which: slice | np.ndarray) -> None:
        self._counts[:, :, which] *= self.decay
        self._counts[:, :, which] += (1 - self.decay) * self.prior

    def priorities(self, n: int, rng: np.random.Generator) -> np.ndarray:
        return self._belief[PARTLY].copy()

    def learn(self, positions: np.ndarray, outcomes: Outcomes) -> None:
        rate = outcomes.success_rate
        wrong, right = rate <= REWARD_TOLERANCE, rate >= 1 - REWARD_TOLERANCE
        state = np.where(wrong, WRONG, np.where(right, RIGHT, PARTLY))
        first = ~self._seen[positions]
        self._count_transitions(positions[first], state[first])
        self._belief[:, positions] = 0.0
        self._belief[state, positions] = 1.0
        self._seen[positions] = True
        self._partly_rates += float(rate[state == PARTLY].sum())
        self._partly_groups += int(np.sum(state == PARTLY))

    def _count_transitions(self, positions: np.ndarray, state: np.ndarray) -> None:
        """Adds P(state before | state now) to the counts of the transitions into the state now, after forgetting."""
        counts = self._counts[:, :, positions]
        joint = counts[state, :, np.arange(len(positions))].T / counts.sum(0) * self._before[:, positions]
        self._forget(positions)
        self._counts[state, :, positions] += (joint / joint.sum(0)).T

    def forecast(self) -> np.ndarray:
        partly = self._partly_rates / self._partly_groups if self._partly_groups else 0.5
        return self._belief[RIGHT] + partly * self._belief[PARTLY]

    def metrics(self) -> dict[str, float]:
        wrong, partly, right = self._belief.mean(1)
        return {
            "selection/belief_wrong": float(wrong),
            "selection/belief_partly": float(partly),
            "selection/belief_right": float(right),
        }

    def state_dict(self) -> dict[str, Any]:
        arrays = {"counts": self._counts, "belief": self._belief, "before": self._before, "seen": self._seen}
        return (
            super().state_dict()
            | {name: torch.from_numpy(array.copy()) for name, array in arrays.items()}
            | {"partly_rates": self._partly_rates, "partly_groups": self._partly_groups}
        )

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self._counts, self._belief, self._before, self._seen = (
            state[name].numpy().copy() for name in ("counts", "belief", "before", "seen")
        )
        self._partly_rates, self._partly_groups = state["partly_rates"], state["partly_groups"]
