"""Confidence intervals of a mean over few runs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

CONFIDENCE = 0.95


@dataclass(frozen=True, slots=True)
class Interval:
    """A mean and its confidence interval.

    Attributes:
        mean: None where there is nothing to average.
        low, high: None with fewer than two values, from which no spread can be told.
    """

    mean: float | None
    low: float | None = None
    high: float | None = None


def mean_interval(values: Sequence[float]) -> Interval:
    """Arithmetic mean with Student's t interval: mean +- t s / sqrt(n), `n - 1` degrees of freedom."""
    count = len(values)
    if not count:
        return Interval(None)
    mean = float(np.mean(values))
    if count == 1:
        return Interval(mean)
    half = student_t(count - 1) * float(np.std(values, ddof=1)) / math.sqrt(count)
    return Interval(mean, mean - half, mean + half)


def geometric_interval(values: Sequence[float]) -> Interval:
    """Geometric mean of ratios above 0, with Student's t interval of their logarithms.

    A ratio of 1/2 and one of 2 cancel out, and the interval of `a / b` is that of `b / a` upside down.
    """
    logs = mean_interval([math.log(value) for value in values])
    return Interval(*(None if bound is None else math.exp(bound) for bound in (logs.mean, logs.low, logs.high)))


def student_t(dof: int, confidence: float = CONFIDENCE) -> float:
    """The t within which the middle `confidence` of Student's distribution with `dof` >= 1 degrees of freedom lies."""
    low, high = 0.0, 1.0
    while _within(high, dof) < confidence:
        high *= 2
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if _within(middle, dof) < confidence else (low, middle)
    return (low + high) / 2


def _within(t: float, dof: int) -> float:
    """P(|T| < t), by the finite series for whole degrees of freedom (Abramowitz and Stegun, 26.7.3 and 26.7.4)."""
    angle = math.atan(t / math.sqrt(dof))
    square = math.cos(angle) ** 2
    # The terms of either series, each the one before times (k - 1) / k cos^2.
    term = math.cos(angle) if dof % 2 else 1.0
    total = term if dof > 1 else 0.0
    for k in range(3 if dof % 2 else 2, dof - 1, 2):
        term *= (k - 1) / k * square
        total += term
    total *= math.sin(angle)
    return 2 / math.pi * (angle + total) if dof % 2 else total
