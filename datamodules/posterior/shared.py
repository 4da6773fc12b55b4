"""What embeddings say about prompts that were never tried: Bayesian linear regression on them.

It is the Gaussian process with kernel `shared phi_i . phi_j + INTERCEPT_VARIANCE`, in weight space (Rasmussen &
Williams 2006, "Gaussian processes for machine learning", section 2.1), so its cost grows with Q r^2, never with Q^2.
"""

from __future__ import annotations

import numpy as np

from datamodules.posterior.constants import INTERCEPT_VARIANCE
from datamodules.posterior.history import Message

CHUNK = 16384


class Shared:
    """Posterior over the weights `w` `[r + 1]` (the last is the intercept) of `g_i = w . [phi_i, 1]`.

    Args:
        features: float32 `[Q, r]`, may be memory-mapped; `r` may be 0.
        variance: prior variance of every weight but the intercept.
    """

    def __init__(self, features: np.ndarray, variance: float) -> None:
        self.features = features
        width = features.shape[1]
        self.precision = np.diag(np.append(np.full(width, 1 / variance), 1 / INTERCEPT_VARIANCE))
        self.shift = np.zeros(width + 1)
        self._factor()

    def update(self, positions: np.ndarray, message: Message) -> None:
        """Takes in what the outcomes at `positions` say."""
        design = self._design(positions)
        self.precision += (design.T * message.precision) @ design
        self.shift += design.T @ message.shift
        self._factor()

    def moments(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Mean and variance of `g` at some positions; float64 `[N]` each."""
        design = self._design(positions)
        return design @ self.weights, ((design @ self._whitening) ** 2).sum(axis=1)

    def all_moments(self) -> tuple[np.ndarray, np.ndarray]:
        """Mean and variance of `g` at every position, in single precision and in chunks; float64 `[Q]` each."""
        whitening, weights = self._whitening.astype(np.float32), self.weights.astype(np.float32)
        mean, variance = np.empty(len(self.features)), np.empty(len(self.features))
        for start in range(0, len(mean), CHUNK):
            rows = np.asarray(self.features[start : start + CHUNK], dtype=np.float32)
            mean[start : start + CHUNK] = rows @ weights[:-1] + weights[-1]
            white = rows @ whitening[:-1] + whitening[-1]
            variance[start : start + CHUNK] = np.einsum("qr,qr->q", white, white)
        return mean, variance

    def restore(self, precision: np.ndarray, shift: np.ndarray) -> None:
        """Puts back a saved posterior."""
        self.precision, self.shift = precision, shift
        self._factor()

    def _factor(self) -> None:
        """`weights` and `_whitening` `[r + 1, r + 1]`, whose product with its transpose is the covariance."""
        lower = np.linalg.cholesky(self.precision)
        self._whitening = np.linalg.inv(lower).T
        self.weights = self._whitening @ (self._whitening.T @ self.shift)

    def _design(self, positions: np.ndarray) -> np.ndarray:
        rows = np.asarray(self.features[positions], dtype=np.float64)
        return np.concatenate([rows, np.ones((len(rows), 1))], axis=1)
