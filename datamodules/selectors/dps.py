"""DPS: a hidden Markov model of every prompt's progress (Mao et al. 2026, arXiv 2603.10887)."""

from __future__ import annotations

from typing import Any, Literal, get_args

import numpy as np
import torch
from scipy.stats import entropy

from datamodules.errors import UserError, nearest
from datamodules.pool import PromptPool
from datamodules.selectors.base import Ranker, SelectionContext
from datamodules.types import REWARD_TOLERANCE, Outcomes

WRONG, PARTLY, RIGHT = 0, 1, 2
Structure = Literal["progress", "stability", "local"]
STRUCTURES: dict[Structure, list[list[float]]] = {
    "progress": [[1.0, 0.5, 0.5], [1.0, 1.0, 0.5], [1.0, 1.0, 1.0]],
    "stability": [[1.0, 0.5, 0.5], [0.5, 1.0, 0.5], [0.5, 0.5, 1.0]],
    "local": [[1.0, 1.0, 0.0], [1.0, 1.0, 1.0], [0.0, 1.0, 1.0]],
}
"""Dirichlet counts of the transitions, `[to, from]`, by name, as in the authors' code."""
Start = Literal["uniform", "wrong", "partly", "right"]


class Dps(Ranker):
    """Chooses the prompts most likely to be partly right now.

    The three states are all wrong, partly right and all right. Every prompt has Dirichlet counts of its transitions,
    whose mean is its transition matrix. Each training step moves every belief one transition ahead and decays all
    counts towards the prior: counts <- lambda counts + (1 - lambda) prior. A measured group reveals its state: the
    belief becomes certain, and the transition is counted, spread over the previous states by their posterior
    probability. This is the paper's filter in the order of the authors' code. Their candidates are a part of the pool,
    here they are the whole pool. Two things more differ where the prior or the start is not uniform: here the belief is
    one transition ahead of the start at the first choice, theirs at the second; and a measured transition that "local"
    holds impossible is counted, while theirs turns into NaN.

    A prompt measured twice in a step (by a reference rollout too) keeps the later state and counts one transition. The
    forecast is not in the paper: P(all right) + P(partly right) times the mean rate of all partly right groups so far
    (0.5 before the first).

    Args:
        decay: lambda in [0, 1], the share of the counts that a step keeps (0.9 to 0.99 in the paper, 0.7 in the
            authors' script for MATH, 0.5 in that for Countdown).
        prior: Dirichlet count of every transition, > 0, or counts by name: "progress" (1, but 0.5 for getting worse),
            "stability" (1 for staying, else 0.5) or "local" (1, but 0 between all wrong and all right).
        start: the state of every prompt before the first step: "uniform" for any, "wrong", "partly" or "right".
        entropy_weight: added to a prompt's probability, times the entropy of its belief in nats, so that uncertain
            prompts are tried; >= 0. Their "topk+entropy".
    """

    def __init__(
        self,
        decay: float = 0.9,
        prior: float | Structure = 1.0,
        start: Start = "uniform",
        entropy_weight: float = 0.0,
    ) -> None:
        super().__init__()
        if not 0 <= decay <= 1:
            raise UserError(f"decay is {decay}, expected lambda in [0, 1]. Use 0.9 to 0.99.")
        if isinstance(prior, str) and prior not in STRUCTURES:
            raise UserError(f"prior is {prior!r}, expected a count > 0 or a name: {nearest(prior, STRUCTURES)}")
        if not isinstance(prior, str) and not 0 < prior < np.inf:
            raise UserError(f"prior is {prior}, expected a count > 0 for every transition. Use e.g. 1.")
        if start not in get_args(Start):
            raise UserError(f"start is {start!r}: {nearest(str(start), get_args(Start))}")
        if not 0 <= entropy_weight < np.inf:
            raise UserError(f"entropy_weight is {entropy_weight}, expected a number >= 0. Use 0 for none.")
        self.decay, self.prior, self.start, self.entropy_weight = decay, prior, start, entropy_weight
        counts = STRUCTURES[prior] if isinstance(prior, str) else np.full((3, 3), float(prior))
        self._prior = np.asarray(counts)[:, :, None]
        """float64 `[3, 3, 1]`: Dirichlet counts before any outcome, indexed as `_counts`."""
        self._counts: np.ndarray
        """float64 `[3, 3, Q]`: Dirichlet counts of transitions, indexed [to, from, prompt]."""
        self._belief: np.ndarray
        """float64 `[3, Q]`: probability of each state in this step given all outcomes so far."""
        self._before: np.ndarray
        """float64 `[3, Q]`: the belief of the previous step."""
        self._seen: np.ndarray
        """bool `[Q]`: measured in this step."""
        self._partly_rates = 0.0
        self._partly_groups = 0

    def setup(self, pool: PromptPool, context: SelectionContext) -> None:
        super().setup(pool, context)
        self._counts = np.repeat(self._prior, len(pool), axis=2)
        self._belief = np.full((3, len(pool)), 1 / 3)
        if self.start != "uniform":
            self._belief[:] = 0.0
            self._belief[get_args(Start).index(self.start) - 1] = 1.0
        self._before = self._belief.copy()
        self._seen = np.zeros(len(pool), dtype=bool)

    def begin_step(self) -> None:
        super().begin_step()
        measured = np.flatnonzero(self._seen)
        kept = self._counts[:, :, measured]
        self._decay(slice(None))
        self._counts[:, :, measured] = kept  # `learn` has decayed these already
        self._seen[:] = False
        self._before = self._belief
        # A loop over the previous state avoids a [3, 3, Q] transition matrix.
        self._belief = sum(self._counts[:, i] * (self._before[i] / self._counts[:, i].sum(0)) for i in range(3))
        self._belief /= self._belief.sum(0)

    def _decay(self, which: slice | np.ndarray) -> None:
        self._counts[:, :, which] *= self.decay
        self._counts[:, :, which] += (1 - self.decay) * self._prior

    def priorities(self, n: int, rng: np.random.Generator) -> np.ndarray:
        if not self.entropy_weight:
            return self._belief[PARTLY].copy()
        return self._belief[PARTLY] + self.entropy_weight * entropy(self._belief)

    def learn(self, positions: np.ndarray, outcomes: Outcomes) -> None:
        rate = outcomes.success_rate
        wrong, right = rate <= REWARD_TOLERANCE, rate >= 1 - REWARD_TOLERANCE
        state = np.where(wrong, WRONG, np.where(right, RIGHT, PARTLY))
        first = ~self._seen[positions]
        new, now = positions[first], state[first]
        # P(previous state | state now), counted after the decay.
        counts = self._counts[:, :, new]
        joint = counts[now, :, np.arange(len(new))].T / counts.sum(0) * self._before[:, new]
        joint = np.where(joint.sum(0) > 0, joint, self._before[:, new])  # impossible until it was measured
        self._decay(new)
        self._counts[now, :, new] += (joint / joint.sum(0)).T
        self._belief[:, positions] = 0.0
        self._belief[state, positions] = 1.0
        self._seen[positions] = True
        self._partly_rates += float(rate[state == PARTLY].sum())
        self._partly_groups += int(np.sum(state == PARTLY))

    def forecast(self) -> np.ndarray:
        partly = self._partly_rates / self._partly_groups if self._partly_groups else 0.5
        return self._belief[RIGHT] + partly * self._belief[PARTLY]

    def informative_chance(self) -> np.ndarray:
        return self._belief[PARTLY].copy()

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
