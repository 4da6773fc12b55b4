"""Calibration of base forecasts (DOTS, arXiv 2506.05316, section 4, and the authors' code).

Every head maps `p -> sigmoid(slope * logit(p) + bias)`; they differ in which parameters are free and in their bounds. A
head trained with the predictor reads (slope, bias) off the references; without one they are fitted to the references.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # torch's own name for it

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
        """Return float64 calibrated success rates of base forecasts of any shape."""
        value = sigmoid(self.slope * logit(base) + self.bias)
        return np.clip(self.gain * value + self.offset, 0.0, 1.0)


def logit(p: np.ndarray) -> np.ndarray:
    """Return float64 log(p / (1 - p)) of p clamped to [1e-4, 1 - 1e-4]."""
    p = np.clip(np.asarray(p, dtype=np.float64), CLAMP, 1 - CLAMP)
    return np.log(p / (1 - p))


def sigmoid(x: np.ndarray) -> np.ndarray:
    """Return 1 / (1 + exp(-x)) without overflow."""
    return 0.5 * (1.0 + np.tanh(0.5 * x))


def soft_cross_entropy(forecast: np.ndarray, rates: np.ndarray) -> float:
    """Return the mean binary cross-entropy of forecasts `[K]`, clamped as in `logit`, against success rates `[K]`."""
    p = np.clip(forecast, CLAMP, 1 - CLAMP)
    return float(-np.mean(rates * np.log(p) + (1 - rates) * np.log1p(-p)))


def fit_calibration(base: np.ndarray, rates: np.ndarray, method: CalibrationName) -> Calibration:
    """Fit (slope, bias) within `BOUNDS[method]` by soft-label cross-entropy.

    The sum over the references is penalised by `RIDGE / 2 * ((slope - 1)^2 + bias^2)`, the weight of a few references,
    so that constant rewards or very few references hardly change the forecast. The objective is strictly convex and is
    minimised by projected Newton steps in float64, so the result is the constrained optimum.

    `group_logit_temperature` is fitted as Platt scaling within the trained head's range: its network would need many
    groups to learn from, while (temperature, bias) themselves can be fitted to one.

    Args:
        base: `[K]` base forecasts of the references, each made without the reference itself (leave-one-out).
        rates: `[K]` measured success rates.
        method: head to fit.
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
    """Return the end of the longest halved step, projected on the box, that does not raise the penalised loss."""

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
    """Append the least-squares line from the calibrated forecasts `[K]` to the measured rates, as in the authors' code.

    Returns the calibration unchanged where a line is meaningless: fewer than three references, all rates or all
    forecasts equal, or a slope that is not positive. The authors apply such a line too, fit it to forecasts in which a
    reference has seen its own rate, and do not clip the result to [0, 1].
    """
    forecast = calibration.apply(base)
    if len(rates) < 3 or np.ptp(rates) < 1e-9 or np.ptp(forecast) < 1e-9:
        return calibration
    centred = forecast - forecast.mean()
    gain = float(centred @ (rates - rates.mean()) / (centred @ centred))
    if gain <= 0:
        return calibration
    return replace(calibration, gain=gain, offset=float(rates.mean() - gain * forecast.mean()))


class CalibrationHead(nn.Module):
    """`p -> sigmoid(slope * logit(clamp(p, 1e-4, 1 - 1e-4)) + bias)`; the base class is the identity ("none").

    Heads are trained with the attention predictor and start as the identity.
    """

    def coefficients(self, rates: Tensor) -> tuple[Tensor, Tensor]:
        """Return the scalars (slope, bias) for a reference set with mean rewards `rates` `[K]`."""
        return rates.new_ones(()), rates.new_zeros(())

    def forward(self, base: Tensor, rates: Tensor) -> Tensor:
        """Return calibrated success rates `[N]` of base forecasts `[N]`."""
        slope, bias = self.coefficients(rates)
        return torch.sigmoid(slope * torch.logit(base, eps=CLAMP) + bias)


class GroupLogitTemperature(CalibrationHead):
    """Temperature in [0.01, 10] and bias in (-1, 1) from the mean and population std of the reference rewards."""

    def __init__(self) -> None:
        super().__init__()
        self.network = nn.Sequential(nn.Linear(2, 10), nn.ReLU(), nn.Linear(10, 2))
        last = self.network[2]
        assert isinstance(last, nn.Linear)
        nn.init.zeros_(last.weight)
        with torch.no_grad():
            last.bias.copy_(torch.tensor([math.log(math.e - 1), 0.0]))

    def coefficients(self, rates: Tensor) -> tuple[Tensor, Tensor]:
        output = self.network(torch.stack([rates.mean(), rates.std(correction=0)]))
        return 1 / F.softplus(output[0]).clamp(1e-2, 10), torch.tanh(output[1])


class Platt(CalibrationHead):
    """A learnt slope and bias, equal for all groups."""

    def __init__(self) -> None:
        super().__init__()
        self.slope = nn.Parameter(torch.ones(()))
        self.bias = nn.Parameter(torch.zeros(()))

    def coefficients(self, rates: Tensor) -> tuple[Tensor, Tensor]:
        return self.slope, self.bias


class Temperature(CalibrationHead):
    """A learnt temperature, equal for all groups."""

    def __init__(self) -> None:
        super().__init__()
        self.log_temperature = nn.Parameter(torch.zeros(()))

    def coefficients(self, rates: Tensor) -> tuple[Tensor, Tensor]:
        return torch.exp(-self.log_temperature), rates.new_zeros(())


HEADS: dict[CalibrationName, type[CalibrationHead]] = {
    "group_logit_temperature": GroupLogitTemperature,
    "platt": Platt,
    "temperature": Temperature,
    "none": CalibrationHead,
}
