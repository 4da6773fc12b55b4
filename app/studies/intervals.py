"""Confidence intervals of a mean over few runs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.special import stdtrit


@dataclass(frozen=True, slots=True)
class Interval:
    """A mean, None without values, and its confidence interval, None with fewer than two."""

    mean: float | None
    low: float | None = None
    high: float | None = None


def mean_interval(values: Sequence[float]) -> Interval:
    """Return the arithmetic mean with Student's t interval: mean +- t s / sqrt(n), `n - 1` degrees of freedom."""
    count, mean = len(values), float(np.mean(values)) if values else None
    if mean is None or count == 1:
        return Interval(mean)
    half = student_t(count - 1) * float(np.std(values, ddof=1)) / math.sqrt(count)
    return Interval(mean, mean - half, mean + half)


def geometric_interval(values: Sequence[float]) -> Interval:
    """Return the geometric mean of ratios above 0, with Student's t interval of their logarithms.

    Ratios of 1/2 and 2 cancel out, and the interval of `a / b` is the inverse of that of `b / a`.
    """
    logs = mean_interval([math.log(value) for value in values])
    return Interval(*(None if bound is None else math.exp(bound) for bound in (logs.mean, logs.low, logs.high)))


def student_t(dof: int, confidence: float = 0.95) -> float:
    """Return the t that bounds the middle `confidence` of Student's distribution with `dof` >= 1 degrees of freedom."""
    return float(stdtrit(dof, (1 + confidence) / 2))
