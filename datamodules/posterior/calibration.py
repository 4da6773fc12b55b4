"""Calibration of P(informative), learnt from the run's own outcomes."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from datamodules.difficulty.calibration import sigmoid

KEPT = 0.98
"""Weight of a batch relative to the next one: about the last fifty count."""
CLIP = 1e-4
"""Probabilities nearer to 0 or 1 than this are treated alike: their log-odds stay finite."""
_EXPECTED = np.array([0.0, 1.0])
_PRECISION = np.diag([2.0, 2.0])
"""Prior precision of bias and slope around `_EXPECTED`, the forecast as it is; a dozen outcomes outweigh it."""
_BINS = 10
_ITERATIONS, _LARGEST_STEP = 40, 0.5


class Calibration:
    """Platt's map `sigmoid(bias + slope logit(p))`, by logistic regression on the outcomes of the chosen prompts.

    What is chosen for a high probability is promised too much (the winner's curse), and a model that is wrong about
    how prompts move is too sure. Both show in the outcomes of the chosen. The regression is Bayesian: the posterior of
    one batch, widened, is the prior of the next (Laplace's approximation; Spiegelhalter & Lauritzen 1990, "Sequential
    updating of conditional probabilities on directed graphical structures").

    Attributes:
        weights: float64 `[2]` bias and slope.
        precision: float64 `[2, 2]` of the belief over them.
        bins: float64 `[10, 3]` by calibrated probability: outcomes, their summed probabilities made before them, and
            how many were informative.
    """

    def __init__(self) -> None:
        self.weights, self.precision = _EXPECTED.copy(), _PRECISION.copy()
        self.bins = np.zeros((_BINS, 3))

    def apply(self, chance: np.ndarray) -> np.ndarray:
        """Return calibrated probabilities, float64 `[N]`, of the model's `[N]`."""
        return sigmoid(_design(chance) @ self.weights)

    def learn(self, chance: np.ndarray, informative: np.ndarray) -> None:
        """Score the model's probabilities `[N]` against outcomes (0 or 1, `[N]`), then learn from them."""
        promised = self.apply(chance)
        places = np.minimum((promised * _BINS).astype(np.int64), _BINS - 1)
        for column, values in enumerate((np.ones(len(promised)), promised, informative)):
            self.bins[:, column] += np.bincount(places, values, _BINS)
        design, before = _design(chance), self.weights
        kept = KEPT * self.precision + (1 - KEPT) * _PRECISION
        for _ in range(_ITERATIONS):
            expected = sigmoid(design @ self.weights)
            gradient = design.T @ (informative - expected) - kept @ (self.weights - before)
            self.precision = (design.T * (expected * (1 - expected))) @ design + kept
            step = np.linalg.solve(self.precision, gradient)
            # Far from the optimum the curvature vanishes and a whole step of Newton's would leap across it.
            self.weights = self.weights + step / max(1.0, float(np.abs(step).max()) / _LARGEST_STEP)

    @property
    def error(self) -> float:
        """Expected calibration error of all probabilities scored so far, 0 before the first."""
        return float(np.abs(self.bins[:, 1] - self.bins[:, 2]).sum() / max(1.0, self.bins[:, 0].sum()))

    def state_dict(self) -> dict[str, Any]:
        """Return the belief and the scores, as tensors."""
        return {name: torch.from_numpy(getattr(self, name).copy()) for name in ("weights", "precision", "bins")}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the state."""
        self.weights, self.precision, self.bins = (
            state[name].numpy().copy() for name in ("weights", "precision", "bins")
        )


def _design(chance: np.ndarray) -> np.ndarray:
    clipped = np.clip(chance, CLIP, 1 - CLIP)
    return np.stack([np.ones_like(clipped), np.log(clipped / (1 - clipped))], axis=1)
