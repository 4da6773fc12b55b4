"""What the rest of a group is worth, given the outcomes of its pilot."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from datamodules.types import REWARD_TOLERANCE, RolloutGroup

DECAY = 0.9
"""Weight of a step's outcomes in the next step: the policy, and so what its prompts are worth, changes."""
_LEAST = 1e-3


class PilotWorth:
    """Learns from a run's pilots how likely a group is informative, and what an informative group costs.

    The success rate of a prompt is Beta distributed with its forecast as mean or, without one, the mean of recent
    pilots. How far rates lie from their means is learnt from recent pilots by the method of moments: with the success
    rate r of a pilot of n completions and its mean m, E (r - m)^2 = m (1 - m) (1 / n + (1 - 1 / n) rho) for Beta(a, b),
    whose rho is 1 / (a + b + 1). A run begins with the flat prior, Beta(1, 1), which counts as much as two pilots.
    """

    def __init__(self) -> None:
        self._sums = {
            "rates": 1.0, "prompts": 2.0, "spread": 1 / 6, "room": 1 / 2, "informative": 0.0, "completions": 0.0,
        }  # fmt: skip

    def begin_step(self) -> None:
        """Let earlier outcomes count less."""
        self._sums = {name: DECAY * value for name, value in self._sums.items()}

    def mean(self, forecast: float) -> float:
        """Return the expected success rate of a prompt, whose forecast may be NaN."""
        return float(
            np.clip(self._sums["rates"] / self._sums["prompts"] if np.isnan(forecast) else forecast, _LEAST, 1 - _LEAST)
        )

    def informative(self, pilot: RolloutGroup, forecast: float, rest: int) -> float:
        """Return the probability that a group becomes informative.

        It is 1 where the pilot already is, and where graded rewards are equal but neither 0 nor 1: the rest may differ.

        Args:
            pilot: the group's first completions; none where their scores failed.
            forecast: the success rate that the selector expects of its prompt, or NaN.
            rest: completions that the group lacks.
        """
        if pilot.informative:
            return 1.0
        tried, right = len(pilot.completions), float(np.clip(pilot.correctness, 0, 1).sum())
        rho = np.clip(self._sums["spread"] / self._sums["room"], _LEAST, 1 - _LEAST)
        mean, weight = self.mean(forecast), 1 / rho - 1
        wins, losses = mean * weight + right, (1 - mean) * weight + tried - right
        more = np.arange(rest)
        all_wrong, all_right = (float(np.prod((one + more) / (wins + losses + more))) for one in (losses, wins))
        wrong, correct = right <= REWARD_TOLERANCE, right >= tried - REWARD_TOLERANCE
        return 1 - all_wrong * wrong - all_right * correct

    def threshold(self, rest: int) -> float:
        """Return the probability from which the rest of a group is worth its completions.

        It is worth them if it yields informative groups at no less than the rate of recent steps, in which every
        completion counts, those of pilots too. At most 1; 0 before the first step is over.
        """
        return min(1.0, rest * self._sums["informative"] / max(1.0, self._sums["completions"]))

    def learn(self, groups: Sequence[RolloutGroup], forecast: np.ndarray, pilot: int) -> None:
        """Learn from rollouts.

        Args:
            groups: `N` groups, completed or not.
            forecast: float64 `[N]`, as for `informative`.
            pilot: completions of a pilot.
        """
        for group, expected in zip(groups, forecast.tolist(), strict=True):
            first = np.clip(group.correctness[:pilot], 0, 1).astype(np.float64)
            if len(first) < 2:
                continue
            rate, mean, share = float(first.mean()), self.mean(expected), 1 / len(first)
            self._sums["spread"] += (rate - mean) ** 2 - mean * (1 - mean) * share
            self._sums["room"] += mean * (1 - mean) * (1 - share)
            self._sums["rates"] += rate
            self._sums["prompts"] += 1
        self._sums["informative"] += sum(group.informative for group in groups)
        self._sums["completions"] += sum(len(group.completions) for group in groups)

    def state_dict(self) -> dict[str, Any]:
        return dict(self._sums)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._sums = dict(state)
