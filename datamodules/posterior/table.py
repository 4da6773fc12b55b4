"""What follows from a Gaussian belief over log-odds, tabulated over (mean, standard deviation) and interpolated.

Each quantity is an integral without closed form, needed for every prompt of the pool at every step, while it depends on
two numbers only.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import comb

import numpy as np

from datamodules.difficulty.calibration import sigmoid
from datamodules.posterior.model import Beliefs
from datamodules.posterior.observation import assimilate, grid, measure

MEANS = np.linspace(-14.0, 14.0, 85)
DEVIATIONS = np.linspace(1e-2, 5.0, 31)
LARGEST_LOOKAHEAD = 16
"""Completions of a group that is looked ahead at: the next outcomes of a larger one are taken as of this size."""


@dataclass(frozen=True, slots=True, eq=False)
class Cells:
    """Where beliefs lie in the table: index of the lower corner `[Q]` and the share `[Q]` of the way to the next."""

    corner: np.ndarray
    along_mean: np.ndarray
    along_deviation: np.ndarray

    @classmethod
    def of(cls, beliefs: Beliefs) -> Cells:
        row, along_mean = _place(beliefs.mean, MEANS)
        column, along_deviation = _place(np.sqrt(beliefs.variance), DEVIATIONS)
        return cls(row * len(DEVIATIONS) + column, along_mean, along_deviation)

    def read(self, values: np.ndarray) -> np.ndarray:
        """float64 `[Q]` of a tabulated quantity `values` `[M, D]`, interpolated bilinearly."""
        flat, width = values.ravel(), len(DEVIATIONS)
        lower = flat[self.corner] * (1 - self.along_mean) + flat[self.corner + width] * self.along_mean
        upper = flat[self.corner + 1] * (1 - self.along_mean) + flat[self.corner + width + 1] * self.along_mean
        return lower + (upper - lower) * self.along_deviation


class BeliefTable:
    """Tables `[M, D]` over `MEANS x DEVIATIONS`.

    Args:
        samples: completions `G` of a group.
        noise: variance of a group's own shift of the log-odds.

    Attributes:
        rate: expected success rate.
        rate_deviation: standard deviation of the success rate.
        informative: probability that a group holds both a success and a failure.
        removed: expected drop of the success rate's variance by one more group.
    """

    def __init__(self, samples: int, noise: float) -> None:
        mean, deviation = (axis.ravel() for axis in np.meshgrid(MEANS, DEVIATIONS, indexing="ij"))
        self._nodes = Beliefs(mean, deviation**2)
        self.rate, square = _rate_moments(self._nodes)
        self.rate_deviation = np.sqrt(np.maximum(square - self.rate**2, 0.0))
        self.informative = _informative(self._nodes, samples, noise)
        self._tabulate_outcomes(min(samples, LARGEST_LOOKAHEAD), noise)

    def _tabulate_outcomes(self, samples: int, noise: float) -> None:
        """For every count k of the next group: its probability, and what would then be believed."""
        nodes, count = self._nodes, np.ones(self._nodes.mean.size)
        chance, informative, square = [], [], np.zeros(self.rate.shape)
        for k in range(samples + 1):
            site = measure(nodes.mean, nodes.variance, noise, k * count, samples * count)
            gain = nodes.variance / (nodes.variance + site.variance)
            after = Cells.of(Beliefs(nodes.mean + gain * (site.value - nodes.mean), nodes.variance * (1 - gain)))
            chance.append((comb(samples, k) * np.exp(site.log_evidence)).reshape(self.rate.shape))
            informative.append(after.read(self.informative).reshape(self.rate.shape))
            square += chance[-1] * after.read(self.rate).reshape(self.rate.shape) ** 2
        self.removed = np.clip(square - self.rate**2, 0.0, self.rate_deviation**2)
        self._chance, self._informative_after = np.stack(chance), np.stack(informative)

    def improvement(self, threshold: float) -> np.ndarray:
        """`[M, D]`: by how much one more group is expected to raise `max(informative, threshold)`."""
        # Moment matching does not keep the mean of the probability exactly; its own mean is the fair comparison.
        mean = (self._chance * self._informative_after).sum(axis=0)
        after = (self._chance * np.maximum(self._informative_after, threshold)).sum(axis=0)
        return np.maximum(after - np.maximum(mean, threshold), 0.0)


def _place(values: np.ndarray, axis: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    scaled = (np.clip(values, axis[0], axis[-1]) - axis[0]) / (axis[1] - axis[0])
    lower = np.minimum(scaled.astype(np.int64), len(axis) - 2)
    return lower, scaled - lower


def _rate_moments(nodes: Beliefs) -> tuple[np.ndarray, np.ndarray]:
    """Mean of the success rate and of its square; `[M, D]` each."""
    steps = grid(float(DEVIATIONS[-1]), 1.0)
    weight = np.exp(-0.5 * steps**2)
    weight /= weight.sum()
    rate = sigmoid(nodes.mean[:, None] + np.sqrt(nodes.variance)[:, None] * steps)
    shape = (len(MEANS), len(DEVIATIONS))
    return (rate @ weight).reshape(shape), (rate**2 @ weight).reshape(shape)


def _informative(nodes: Beliefs, samples: int, noise: float) -> np.ndarray:
    """`1 - E[p^G] - E[(1 - p)^G]`, `[M, D]`."""
    count, zero = np.full(nodes.mean.size, float(samples)), np.zeros(nodes.mean.size)
    spread = nodes.variance + noise
    all_right = np.exp(assimilate(nodes.mean, spread, count, count).log_evidence)
    all_wrong = np.exp(assimilate(nodes.mean, spread, zero, count).log_evidence)
    return np.clip(1 - all_right - all_wrong, 0.0, 1.0).reshape(len(MEANS), len(DEVIATIONS))
