"""How far each prompt's gradient agrees with the others': measured on sketches, forecast from texts.

LearnAlign (arXiv 2506.11480) scores a prompt by the mean cosine of its gradient with those of all prompts. Here the
mean is over the latest groups trained on, and the cosines are those of their sketches (`types.GroupSketch`).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from datamodules.posterior.model import CHUNK, Message, Shared

_LEAST_GROUPS = 8
"""Groups before which all prompts are taken to agree alike."""
_DEVIATIONS = 2.0
"""Standard errors of its noise by which the variance of agreement must exceed it."""
_SHARED = 0.5
"""Share of the variance of agreement that the texts are taken to explain, before anything is known."""


@dataclass(frozen=True, slots=True, eq=False)
class Forecast:
    """Expected agreement of every prompt, as means and variances, float64 `[Q]` each."""

    mean: np.ndarray
    variance: np.ndarray

    def positive_part(self) -> np.ndarray:
        """Return `E max(x, 0)` of each Gaussian belief, float64 `[Q]`: a group that disagrees counts as nothing."""
        deviation = np.sqrt(self.variance)
        z = torch.from_numpy(self.mean / deviation)
        density = torch.exp(-0.5 * z.square()) / np.sqrt(2 * np.pi)
        return deviation * (z * torch.special.ndtr(z) + density).numpy()


@dataclass(frozen=True, slots=True, eq=False)
class GradientMemory:
    """The gradients of the latest groups, oldest first; arrays of `N` rows.

    Attributes:
        positions: int64, pool position of each group's prompt.
        units: float32 `[N, D]`, sketches of length 1.
        weights: float64, weight of each in the mean.
        expected: float64, the agreement that was forecast of it.
    """

    positions: np.ndarray
    units: np.ndarray
    weights: np.ndarray
    expected: np.ndarray

    @classmethod
    def empty(cls) -> GradientMemory:
        """Return a memory without groups."""
        return cls(np.empty(0, dtype=np.int64), np.empty((0, 0), dtype=np.float32), np.empty(0), np.empty(0))

    def __len__(self) -> int:
        return len(self.positions)

    def joined(self, later: GradientMemory, limit: int) -> GradientMemory:
        """Return the memory with later groups, without the oldest beyond `limit`."""
        parts = (self, later) if len(self) else (later,)
        return GradientMemory(
            np.concatenate([one.positions for one in parts])[-limit:],
            np.concatenate([one.units for one in parts])[-limit:],
            np.concatenate([one.weights for one in parts])[-limit:],
            np.concatenate([one.expected for one in parts])[-limit:],
        )

    def agreement(self) -> tuple[np.ndarray, float]:
        """Return each group's weighted mean cosine with the groups of other prompts, float64 `[N]`, and its noise.

        The noise is the mean squared standard error of these means, if the others were drawn at random.
        """
        cosines = (self.units @ self.units.T).astype(np.float64)
        weights = np.where(self.positions[:, None] == self.positions, 0.0, self.weights)
        weights /= np.maximum(weights.sum(1, keepdims=True), 1e-12)
        agreement = (weights * cosines).sum(1)
        return agreement, float((weights**2 * (cosines - agreement[:, None]) ** 2).sum(1).mean())

    def forecast(self, features: np.ndarray) -> Forecast | None:
        """Forecast the agreement of every prompt; None where the memory does not tell prompts apart.

        A Bayesian linear regression on the texts and a deviation of each prompt of its own, whose variances together
        are what the measured agreements vary by beyond their noise.

        Args:
            features: float32 `[Q, r]`, centred and of about unit length; `r` may be 0.
        """
        prompts, place, groups = np.unique(self.positions, return_inverse=True, return_counts=True)
        if len(prompts) < _LEAST_GROUPS:
            return None
        agreement, noise = self.agreement()
        signal = float(agreement.var()) - noise * (1 + _DEVIATIONS * np.sqrt(2 / len(self)))
        if signal <= 0:
            return None
        own = signal * (1 - _SHARED if features.shape[1] else 1.0)
        shared = Shared(features[prompts], signal * _SHARED)
        measured, error = np.bincount(place, agreement) / groups, noise / groups
        weight = 1 / (own + error)
        shared.update(np.arange(len(prompts)), Message(weight, weight * measured))
        mean, variance = _linear(features, shared.weights), np.full(len(features), own)
        gain = own / (own + error)
        mean[prompts] += gain * (measured - mean[prompts])
        variance[prompts] *= 1 - gain
        return Forecast(mean, np.maximum(variance, 1e-6 * signal))

    def pearson(self) -> float:
        """Return the correlation of the agreement now with what was forecast of each group; NaN if there is none."""
        known = np.isfinite(self.expected)
        if known.sum() < _LEAST_GROUPS:
            return float("nan")
        expected, agreement = self.expected[known], self.agreement()[0][known]
        if not (expected.std() and agreement.std()):
            return float("nan")
        return float(np.corrcoef(expected, agreement)[0, 1])

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Return the arrays as tensors."""
        return {name: torch.from_numpy(getattr(self, name).copy()) for name in self.__slots__}

    @classmethod
    def restored(cls, state: dict[str, torch.Tensor]) -> GradientMemory:
        """Return the memory whose `state_dict` is `state`."""
        return cls(**{name: tensor.numpy().copy() for name, tensor in state.items()})


def _linear(features: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Return `weights . [features, 1]`, float64 `[Q]`, in chunks of possibly memory-mapped features."""
    slopes, found = weights[:-1].astype(np.float32), np.empty(len(features))
    for start in range(0, len(found), CHUNK):
        found[start : start + CHUNK] = np.asarray(features[start : start + CHUNK], dtype=np.float32) @ slopes
    return found + weights[-1]
