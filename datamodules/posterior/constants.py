"""The five numbers of the model that a run teaches."""

from __future__ import annotations

from dataclasses import asdict, dataclass

import numpy as np

INTERCEPT_VARIANCE = 4.0
"""Prior variance of the pool's mean log-odds: success anywhere from 2% to 98%. One batch of outcomes outweighs it."""

_SPREAD = np.array([1.0, 1.0, 1.5, 1.5, 1.5])
_LOWEST = np.array([0.05, 1e-3, 5.0, 1e-4, 1e-6])
_HIGHEST = np.array([50.0, 50.0, 1e5, 4.0, 1.0])


@dataclass(frozen=True, slots=True)
class Constants:
    """Variances of log-odds; the defaults are where a run starts.

    Attributes:
        own: variance of a prompt's own course around what its embedding says.
        shared: variance of what an embedding of unit length says.
        memory: steps after which a prompt's own course has forgotten all but 1/e of where it was.
        noise: variance of a group's own shift, beside the binomial draw (over-dispersion).
        drift: variance of the common drift's step.
    """

    own: float = 4.0
    shared: float = 2.0
    memory: float = 300.0
    noise: float = 0.03
    drift: float = 1e-3

    def logarithms(self) -> np.ndarray:
        """float64 `[5]`, in the order of the attributes."""
        return np.log(np.array(list(asdict(self).values())))

    @classmethod
    def of(cls, logarithms: np.ndarray) -> Constants:
        """The inverse of `logarithms`, kept within wide bounds."""
        return cls(*np.clip(np.exp(logarithms), _LOWEST, _HIGHEST).tolist())


def log_hyperprior(constants: Constants) -> float:
    """Log-normal around the defaults, a factor of e to e^1.5 wide: a few dozen outcomes outweigh it."""
    distance = (constants.logarithms() - Constants().logarithms()) / _SPREAD
    return float(-0.5 * distance @ distance)
