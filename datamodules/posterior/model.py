"""The whole model: drift, shared part and own courses, updated by each batch of outcomes."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

from datamodules.posterior.constants import Constants
from datamodules.posterior.drift import Drift
from datamodules.posterior.history import History
from datamodules.posterior.observation import measure
from datamodules.posterior.shared import Shared


@dataclass(frozen=True, slots=True, eq=False)
class Beliefs:
    """Log-odds of success of every prompt now: `N(mean, variance)`, float64 `[Q]` each."""

    mean: np.ndarray
    variance: np.ndarray


class PosteriorModel:
    """Filters the log-odds `x_i(t) = m(t) + z_i(t)` of a pool. See the package's docstring for the model.

    Exact for Gaussian measurements of x and known drift, as the tests check against a dense Gaussian process.
    Approximate in three ways: a group enters as the Gaussian measurement that changes the belief's two moments as the
    group does; the own courses are updated with the drift at its filtered mean; outcomes of one batch are linearised
    at the beliefs before the batch.

    Args:
        features: float32 `[Q, r]` embeddings, of about unit length and centred.
        constants: of the model.
    """

    def __init__(self, features: np.ndarray, constants: Constants) -> None:
        self.constants = constants
        self.step = 0
        self.drift = Drift()
        self.history = History(len(features), constants)
        self.shared = Shared(features, constants.shared)

    def advance(self, steps: int = 1) -> None:
        """Time passes."""
        self.step += steps
        self.drift.advance(steps * self.constants.drift)

    def observe(self, positions: np.ndarray, successes: np.ndarray, samples: np.ndarray) -> float:
        """Takes in groups of the prompts at `positions`, int64 `[N]`, distinct.

        Args:
            positions: pool positions.
            successes: float64 `[N]` summed rewards.
            samples: float64 `[N]` completions.

        Returns:
            The log-probability that the model gave these outcomes, each on its own, up to a constant of the outcomes.
        """
        mean, variance = self._course(positions)
        # Rounding can leave a course that was measured very often without any variance.
        spread = np.maximum(variance + self.drift.variance, 1e-8)
        sites = measure(self.drift.mean + mean, spread, self.constants.noise, successes, samples)
        self.drift.update(sites, mean, variance)
        message = self.history.update(self.step, positions, sites.value - self.drift.mean, sites.variance)
        self.shared.update(positions, message)
        return float(sites.log_evidence.sum())

    def beliefs(self) -> Beliefs:
        """Of every prompt, now."""
        own = self.history.now(self.step)
        mean, variance = self.shared.all_moments()
        return Beliefs(
            self.drift.mean + own.level + own.pull * mean,
            np.maximum(own.spread + own.pull**2 * variance + self.drift.variance, 1e-8),
        )

    def _course(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Mean and variance of `z` now; float64 `[N]` each."""
        own = self.history.now(self.step, positions)
        mean, variance = self.shared.moments(positions)
        return own.level + own.pull * mean, own.spread + own.pull**2 * variance

    def state_dict(self) -> dict[str, Any]:
        """Everything but the features, as tensors and plain values."""
        arrays = {name: getattr(self.history, name) for name in ("level", "pull", "spread", "last")}
        arrays |= {"precision": self.shared.precision, "shift": self.shared.shift}
        return {
            "constants": asdict(self.constants),
            "step": self.step,
            "drift": [self.drift.mean, self.drift.variance],
            "arrays": {name: torch.from_numpy(array.copy()) for name, array in arrays.items()},
        }

    @classmethod
    def restored(cls, features: np.ndarray, state: dict[str, Any]) -> PosteriorModel:
        """The model that `state_dict` came from."""
        model = cls(features, Constants(**state["constants"]))
        model.step = state["step"]
        model.drift = Drift(*state["drift"])
        arrays = {name: tensor.numpy().copy() for name, tensor in state["arrays"].items()}
        for name in ("level", "pull", "spread", "last"):
            setattr(model.history, name, arrays[name])
        model.shared.restore(arrays["precision"], arrays["shift"])
        return model
