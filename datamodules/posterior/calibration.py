"""Calibration of P(informative), learnt from the run's own outcomes."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from datamodules.difficulty.calibration import sigmoid

KEPT = np.array([0.98, 0.96, 0.92, 0.84, 0.68])
"""Weights of a batch relative to the next one, float64 `[K]`: about the latest fifty count, 25, 12, six or three."""
DISCOUNT = 0.99
"""Weight of a batch's evidence for each of them, relative to the next batch's (Raftery et al. 2010)."""
CLIP = 1e-4
"""Probabilities nearer to 0 or 1 than this are treated alike: their log-odds stay finite."""
_SHIFTS = np.array([2.0, 1.6])
"""Shifts of the log-odds that the outcomes of a batch have in common: number and summed squares of those assumed before
the first one."""
_EXPECTED = np.array([0.0, 1.0, 0.0, 0.0])
_PRECISION = np.diag([2.0, 2.0, 2.0, 2.0])
"""Prior precision of the weights around `_EXPECTED`, the forecast as it is; a dozen outcomes outweigh it."""
_START = _EXPECTED, _PRECISION, _SHIFTS
_BINS = 10
_STATE = ("weights", "precision", "shifts", "evidence", "bins")
_ITERATIONS, _LARGEST_STEP, _NEGLIGIBLE_STEP = 40, 0.5, 1e-9


def design(chance: np.ndarray, mean: np.ndarray, rested: np.ndarray) -> np.ndarray:
    """Return what the calibration looks at, float64 `[N, 4]`.

    A constant; the log-odds of the model's P(informative); the side of one half on which the prompt is; and the
    logarithm of the time since its latest outcome. The last two are where the model errs in a way that depends on the
    run: how soon prompts that are mastered, or hopeless, return to what their texts promise.

    Args:
        chance: P(informative) as the model has it, float64 `[N]`.
        mean: mean log-odds of success, float64 `[N]`.
        rested: steps since the latest outcome, float64 `[N]`; 0 for a prompt without one.
    """
    clipped = np.clip(chance, CLIP, 1 - CLIP)
    columns = np.ones_like(clipped), np.log(clipped / (1 - clipped)), np.tanh(mean), np.log(np.maximum(rested, 1.0))
    return np.stack(columns, axis=1)


class Calibration:
    """Logistic regression of the chosen prompts' outcomes on `design`: Platt's map with two more inputs.

    What is chosen for a high probability is promised too much (the winner's curse), and a model that is wrong about
    how prompts move is too sure. Both show in the outcomes of the chosen. These are not independent: what the model
    does not know of the policy is the same for the whole batch. So every batch has a shift of its own (a mixed model;
    Breslow & Clayton 1993, "Approximate inference in generalized linear mixed models"), and a large batch at the start
    does not pass for hundreds of proofs. How much batches shift is learnt by expectation maximisation. The regression
    is Bayesian: the posterior of one batch, widened, is the prior of the next (Laplace's approximation; Spiegelhalter &
    Lauritzen 1990, "Sequential updating of conditional probabilities on directed graphical structures").

    How fast the model's errors change depends on the run. So there is a regression for each rate of forgetting in
    `KEPT`, and a promise is their mean, weighted by how well each has predicted the batches so far (Raftery, Karny &
    Ettler 2010, "Online prediction under model uncertainty via dynamic model averaging").

    Attributes:
        weights: float64 `[K, 4]` of the columns of `design`, by rate of forgetting.
        precision: float64 `[K, 4, 4]` of the beliefs over them.
        shifts: float64 `[K, 2]` number of batches and the expected sum of their squared shifts, older ones counting
            less.
        evidence: float64 `[K]` log-probabilities given to the outcomes of the batches, older ones counting less.
        bins: float64 `[10, 3]` by calibrated probability: outcomes, their summed probabilities made before them, and
            how many were informative.
    """

    def __init__(self) -> None:
        self.weights, self.precision, self.shifts = (np.stack([one] * len(KEPT)) for one in _START)
        self.evidence, self.bins = np.zeros(len(KEPT)), np.zeros((_BINS, 3))

    @property
    def variance(self) -> np.ndarray:
        """Variance of the log-odds' shift that all outcomes of a batch have in common, float64 `[K]`."""
        return self.shifts[:, 1] / self.shifts[:, 0]

    @property
    def shares(self) -> np.ndarray:
        """Weights of the rates of forgetting in a promise, float64 `[K]`; their sum is 1."""
        likelihood = np.exp(self.evidence - self.evidence.max())
        return likelihood / likelihood.sum()

    def apply(self, rows: np.ndarray) -> np.ndarray:
        """Return calibrated probabilities, float64 `[N]`, of prompts with the `design` `[N, 4]`.

        Those of each rate are the means over the batch's shift, approximately (MacKay 1992, "The evidence framework
        applied to classification networks", equation 10).
        """
        weights = self.weights / np.sqrt(1 + np.pi / 8 * self.variance)[:, None]
        return np.sum([share * sigmoid(rows @ one) for share, one in zip(self.shares, weights, strict=True)], axis=0)

    def learn(self, rows: np.ndarray, informative: np.ndarray) -> None:
        """Score the promises of a batch with the `design` `[N, 4]` against its outcomes, then learn from them.

        `informative` is 0 or 1, or between them the probability that it would have been, float64 `[N]`.
        """
        promised = self.apply(rows)
        places = np.minimum((promised * _BINS).astype(np.int64), _BINS - 1)
        for column, values in enumerate((np.ones(len(promised)), promised, informative)):
            self.bins[:, column] += np.bincount(places, values, _BINS)
        width = self.weights.shape[1]
        rows = np.concatenate([rows, np.ones((len(rows), 1))], axis=1)  # the last weight is the batch's shift
        prior = np.zeros((len(KEPT), width + 1, width + 1))
        kept = KEPT[:, None, None]
        prior[:, :width, :width] = kept * self.precision + (1 - kept) * _PRECISION
        prior[:, width, width] = 1 / self.variance
        before = np.pad(self.weights, ((0, 0), (0, 1)))
        weights, precision = before, prior
        for _ in range(_ITERATIONS):
            expected = sigmoid(weights @ rows.T)
            gradient = (informative - expected) @ rows - _times(prior, weights - before)
            precision = (rows.T * (expected * (1 - expected))[:, None]) @ rows + prior
            step = np.linalg.solve(precision, gradient[..., None])[..., 0]
            largest = np.abs(step).max(axis=1, keepdims=True)
            # Far from the optimum the curvature vanishes and a whole step of Newton's would leap across it.
            weights = weights + step / np.maximum(1.0, largest / _LARGEST_STEP)
            if largest.max() < _NEGLIGIBLE_STEP:
                break
        log_odds, moved = weights @ rows.T, weights - before
        likelihood = (informative * log_odds - np.logaddexp(0, log_odds)).sum(axis=1)
        likelihood -= 0.5 * (moved * _times(prior, moved)).sum(axis=1)
        occam = 0.5 * (np.linalg.slogdet(prior)[1] - np.linalg.slogdet(precision)[1])
        self.evidence = DISCOUNT * self.evidence + likelihood + occam
        self.weights = weights[:, :width]
        # The shift is gone with its batch: the precision of the others without knowing it.
        shared, own = precision[:, :width, width], precision[:, width, width]
        self.precision = precision[:, :width, :width] - shared[:, :, None] * shared[:, None] / own[:, None, None]
        square = weights[:, width] ** 2 + np.linalg.inv(precision)[:, width, width]
        counted = np.stack([np.ones(len(KEPT)), square], axis=1)
        self.shifts = KEPT[:, None] * self.shifts + (1 - KEPT[:, None]) * _SHIFTS + counted

    @property
    def error(self) -> float:
        """Expected calibration error of all probabilities scored so far, 0 before the first."""
        return float(np.abs(self.bins[:, 1] - self.bins[:, 2]).sum() / max(1.0, self.bins[:, 0].sum()))

    def state_dict(self) -> dict[str, Any]:
        """Return the belief and the scores, as tensors."""
        return {name: torch.from_numpy(getattr(self, name).copy()) for name in _STATE}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the state."""
        arrays = (state[name].numpy().copy() for name in _STATE)
        self.weights, self.precision, self.shifts, self.evidence, self.bins = arrays


def _times(matrices: np.ndarray, vectors: np.ndarray) -> np.ndarray:
    """Return the products of `[K, n, n]` with `[K, n]`, `[K, n]`."""
    return np.einsum("kij,kj->ki", matrices, vectors)
