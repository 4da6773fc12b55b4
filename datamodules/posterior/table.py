"""Quantities that follow from a Gaussian belief over log-odds, tabulated over (mean, standard deviation).

Each is an integral without closed form that is needed for every prompt at every step but depends on two numbers only.
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
MAX_LOOKAHEAD = 16
"""Largest group whose outcomes are looked ahead at; larger groups are treated as groups of this size."""


@dataclass(frozen=True, slots=True, eq=False)
class Cells:
    """Places of beliefs in the table; arrays `[Q]`.

    `corner` is the flat index of the lower corner, `along_*` the fraction of the way to the next mean or deviation.
    """

    corner: np.ndarray
    along_mean: np.ndarray
    along_deviation: np.ndarray

    @classmethod
    def of(cls, beliefs: Beliefs) -> Cells:
        """Return the places of the beliefs, clipped to the table."""
        row, along_mean = _locate(beliefs.mean, MEANS)
        column, along_deviation = _locate(np.sqrt(beliefs.variance), DEVIATIONS)
        return cls(row * len(DEVIATIONS) + column, along_mean, along_deviation)

    def __getitem__(self, positions: np.ndarray | slice) -> Cells:
        return Cells(self.corner[positions], self.along_mean[positions], self.along_deviation[positions])

    @property
    def mean(self) -> np.ndarray:
        """Means of the beliefs, clipped to the table, float64 `[Q]`."""
        return MEANS[self.corner // len(DEVIATIONS)] + self.along_mean * (MEANS[1] - MEANS[0])

    def read(self, values: np.ndarray) -> np.ndarray:
        """Interpolate a tabulated quantity `values` `[M, D]` bilinearly; returns float64 `[Q]`."""
        flat, width = values.ravel(), len(DEVIATIONS)
        lower = flat[self.corner] * (1 - self.along_mean) + flat[self.corner + width] * self.along_mean
        upper = flat[self.corner + 1] * (1 - self.along_mean) + flat[self.corner + width + 1] * self.along_mean
        return lower + (upper - lower) * self.along_deviation


def _locate(values: np.ndarray, axis: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    scaled = (np.clip(values, axis[0], axis[-1]) - axis[0]) / (axis[1] - axis[0])
    lower = np.minimum(scaled.astype(np.int64), len(axis) - 2)
    return lower, scaled - lower


class BeliefTable:
    """Tables `[M, D]` over `MEANS x DEVIATIONS`.

    Args:
        samples: completions `G` of a group.
        noise: variance of a group's own shift of the log-odds.

    Attributes:
        rate: expected success rate.
        rate_deviation: standard deviation of the success rate.
        informative: probability that a group has both a success and a failure, `1 - E[p^G] - E[(1 - p)^G]`.
        removed: expected reduction of the success rate's variance by one more group.
    """

    def __init__(self, samples: int, noise: float) -> None:
        mean, deviation = (axis.ravel() for axis in np.meshgrid(MEANS, DEVIATIONS, indexing="ij"))
        shape = (len(MEANS), len(DEVIATIONS))
        variance = deviation**2
        nodes = Beliefs(mean, variance)

        steps = grid(float(DEVIATIONS[-1]), 1.0)
        weight = np.exp(-0.5 * steps**2)
        weight /= weight.sum()
        rate = sigmoid(mean[:, None] + np.sqrt(variance)[:, None] * steps)
        self.rate, square = (rate @ weight).reshape(shape), (rate**2 @ weight).reshape(shape)
        self.rate_deviation = np.sqrt(np.maximum(square - self.rate**2, 0.0))

        count, zero, spread = np.full(mean.size, float(samples)), np.zeros(mean.size), variance + noise
        all_right = np.exp(assimilate(mean, spread, count, count).log_evidence)
        all_wrong = np.exp(assimilate(mean, spread, zero, count).log_evidence)
        self.informative = np.clip(1 - all_right - all_wrong, 0.0, 1.0).reshape(shape)

        self._tabulate_outcomes(nodes, min(samples, MAX_LOOKAHEAD), noise)

    def _tabulate_outcomes(self, nodes: Beliefs, samples: int, noise: float) -> None:
        """Tabulate the probability of every success count of the next group and the beliefs it would lead to."""
        count, shape = np.ones(nodes.mean.size), self.rate.shape
        chance, informative, square = [], [], np.zeros(shape)
        for k in range(samples + 1):
            site = measure(nodes.mean, nodes.variance, noise, k * count, samples * count)
            gain = nodes.variance / (nodes.variance + site.variance)
            after = Cells.of(Beliefs(nodes.mean + gain * (site.value - nodes.mean), nodes.variance * (1 - gain)))
            chance.append((comb(samples, k) * np.exp(site.log_evidence)).reshape(shape))
            informative.append(after.read(self.informative).reshape(shape))
            square += chance[-1] * after.read(self.rate).reshape(shape) ** 2
        self.removed = np.clip(square - self.rate**2, 0.0, self.rate_deviation**2)
        self._chance, self._informative_after = np.stack(chance), np.stack(informative)

    def improvement(self, threshold: float) -> np.ndarray:
        """Return the expected increase of `max(informative, threshold)` by one more group, `[M, D]`."""
        # Moment matching does not preserve the mean of the probability exactly, so its own mean is the baseline.
        mean = (self._chance * self._informative_after).sum(axis=0)
        after = (self._chance * np.maximum(self._informative_after, threshold)).sum(axis=0)
        return np.maximum(after - np.maximum(mean, threshold), 0.0)
