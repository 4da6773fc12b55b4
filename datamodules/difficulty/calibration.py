"""From a base forecast to a calibrated one.

Every head maps `p -> sigmoid(slope * logit(p) + bias)`; they differ in which of the two may move and how far. A trained
predictor carries a head that reads (slope, bias) off the references (`heads.py`); here they are fitted on the
references at hand. DOTS, arXiv 2506.05316, section 4 and the authors' code.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

CalibrationName = Literal["group_logit_temperature", "platt", "temperature", "none"]

CLAMP = 1e-4
RIDGE = 1.0
BOUNDS: dict[str, tuple[tuple[float, float], tuple[float, float]]] = {
    # The trained head's range: temperature in [0.01, 10], bias in [-1, 1].
    "group_logit_temperature": ((0.1, -1.0), (100.0, 1.0)),
    "platt": ((0.01, -10.0), (100.0, 10.0)),
    "temperature": ((0.1, 0.0), (100.0, 0.0)),
    "none": ((1.0, 0.0), (1.0, 0.0)),
}
"""Lower and upper limits of (slope, bias) by head."""


@dataclass(frozen=True, slots=True)
class Calibration:
    """`p -> clip(gain * sigmoid(slope * logit(clip(p, 1e-4, 1 - 1e-4)) + bias) + offset, 0, 1)`.

    Attributes:
        slope: 1 / temperature.
        bias: shift of the logit.
        gain: slope of the least-squares refit, 1 without.
        offset: intercept of the least-squares refit, 0 without.
    """

    slope: float = 1.0
    bias: float = 0.0
    gain: float = 1.0
    offset: float = 0.0

    @property
    def temperature(self) -> float:
        return 1.0 / self.slope

    def apply(self, base: np.ndarray) -> np.ndarray:
        """float64 calibrated success rates of the base forecasts, any shape."""
        value = sigmoid(self.slope * logit(base) + self.bias)
        return np.clip(self.gain * value + self.offset, 0.0, 1.0)


def logit(p: np.ndarray) -> np.ndarray:
    """log(p / (1 - p)) of p clamped to [1e-4, 1 - 1e-4]; float64."""
    p = np.clip(np.asarray(p, dtype=np.float64), CLAMP, 1 - CLAMP)
    return np.log(p / (1 - p))


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 0.5 * (1.0 + np.tanh(0.5 * x))


def soft_cross_entropy(forecast: np.ndarray, rates: np.ndarray) -> float:
    """Mean binary cross-entropy of forecasts `[K]`, clamped as `logit` does, against success rates `[K]`."""
    p = np.clip(forecast, CLAMP, 1 - CLAMP)
    return float(-np.mean(rates * np.log(p) + (1 - rates) * np.log1p(-p)))


def fit_calibration(base: np.ndarray, rates: np.ndarray, method: CalibrationName) -> Calibration:
    """(slope, bias) within `BOUNDS[method]` of least soft-label cross-entropy.

    The sum over the references carries the penalty `RIDGE / 2 * ((slope - 1)^2 + bias^2)`: as much as a few references
    say, so that constant rewards or a handful of references leave the forecast nearly as it is. Minimised by projected
    Newton steps in float64; the objective is strictly convex, so the result is the constrained optimum.

    Untrained `group_logit_temperature` is Platt scaling kept to the trained head's range: its network from the
    references' mean and standard deviation to (temperature, bias) would need many groups to learn from, while on the
    one group at hand (temperature, bias) themselves can be fitted.

    Args:
        base: `[K]` base forecasts of the references, each made without the reference itself (leave-one-out).
        rates: `[K]` measured success rates.
        method: head.
    """
    low, high = (np.array(bound) for bound in BOUNDS[method])
    design = np.stack([logit(base), np.ones(len(base))], axis=1)
    prior = np.array([1.0, 0.0])
    theta = prior
    for _ in range(100):
        p = sigmoid(design @ theta)
        gradient = design.T @ (p - rates) + RIDGE * (theta - prior)
        free = ~(((theta <= low) & (gradient >= 0)) | ((theta >= high) & (gradient <= 0)))
        if not free.any() or np.abs(gradient[free]).max() < 1e-9:
            break
        hessian = (design.T * (p * (1 - p))) @ design + RIDGE * np.eye(2)
        step = np.zeros(2)
        step[free] = np.linalg.solve(hessian[np.ix_(free, free)], gradient[free])
        following = _line_search(design, rates, theta, step, low, high)
        if np.array_equal(following, theta):
            break
        theta = following
    return Calibration(slope=float(theta[0]), bias=float(theta[1]))


def _line_search(
    design: np.ndarray, rates: np.ndarray, theta: np.ndarray, step: np.ndarray, low: np.ndarray, high: np.ndarray
) -> np.ndarray:
    """The longest of the halved steps, projected on the box, that does not raise the penalised loss."""

    def loss(point: np.ndarray) -> float:
        x = design @ point
        return float(np.sum(np.logaddexp(0, x) - rates * x) + RIDGE / 2 * np.sum((point - (1.0, 0.0)) ** 2))

    start = loss(theta)
    for halving in range(40):
        candidate = np.clip(theta - step * 0.5**halving, low, high)
        if loss(candidate) <= start:
            return candidate
    return theta


def refit_line(calibration: Calibration, base: np.ndarray, rates: np.ndarray) -> Calibration:
    """The calibration followed by the ordinary least-squares line from its own forecasts `[K]` to the measured rates.

    The authors' code does so on its references. Left as it is where a line says nothing: fewer than three references,
    all rates or all forecasts equal, or a slope that is not positive.
    """
    forecast = calibration.apply(base)
    if len(rates) < 3 or np.ptp(rates) < 1e-9 or np.ptp(forecast) < 1e-9:
        return calibration
    centred = forecast - forecast.mean()
    gain = float(centred @ (rates - rates.mean()) / (centred @ centred))
    if gain <= 0:
        return calibration
    return replace(calibration, gain=gain, offset=float(rates.mean() - gain * forecast.mean()))
