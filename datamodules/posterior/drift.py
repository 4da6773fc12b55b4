"""The common drift of an improving policy: one random walk in the log-odds of every prompt."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from datamodules.posterior.observation import Sites


@dataclass(slots=True)
class Drift:
    """Belief over `m(t)`: a scalar Kalman filter. It starts at 0, the pool's level being the shared part's intercept.

    Attributes:
        mean: filtered mean.
        variance: filtered variance.
    """

    mean: float = 0.0
    variance: float = 0.0

    def advance(self, step_variance: float) -> None:
        """A step passes."""
        self.variance += step_variance

    def update(self, sites: Sites, mean: np.ndarray, variance: np.ndarray) -> None:
        """Takes in measurements `m + z_i + error`, where `z_i ~ N(mean_i, variance_i)`; arrays `[N]`.

        The `z_i` are taken as independent, so what prompts with like embeddings have in common counts as often as
        there are such prompts.
        """
        if self.variance <= 0:
            return
        weight = 1 / (variance + sites.variance)
        precision = 1 / self.variance + weight.sum()
        self.mean = float((self.mean / self.variance + weight @ (sites.value - mean)) / precision)
        self.variance = float(1 / precision)
