"""Whether forecasts mean what they say: calibration by bins."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, slots=True, eq=False)
class Reliability:
    """Forecasts grouped by size; `M` bins that hold any.

    Attributes:
        forecast: float64 `[M]`, mean forecast of each bin, rising.
        measured: float64 `[M]`, mean success measured in it.
        standard_error: float64 `[M]` of `measured`; 0 for a bin of one.
        count: int64 `[M]`.
    """

    forecast: np.ndarray
    measured: np.ndarray
    standard_error: np.ndarray
    count: np.ndarray

    @property
    def error(self) -> float:
        """Expected calibration error (Guo et al. 2017, arXiv 1706.04599, eq. 3): mean |measured - forecast| over
        bins, each by its share of the forecasts; NaN for none."""
        if not len(self.count):
            return float("nan")
        return float(np.average(np.abs(self.measured - self.forecast), weights=self.count))


def reliability(forecast: np.ndarray, measured: np.ndarray, bins: int = 10) -> Reliability:
    """Groups forecasts into equal parts of [0, 1] and sets them against the outcomes.

    Args:
        forecast: float64 `[N]` in [0, 1].
        measured: float64 `[N]`.
        bins: parts; a forecast on a border belongs to the upper one, 1.0 to the last.
    """
    part = np.clip((forecast * bins).astype(np.int64), 0, bins - 1)
    count = np.bincount(part, minlength=bins)
    held = np.flatnonzero(count)
    count = count[held]

    def mean(values: np.ndarray) -> np.ndarray:
        return np.bincount(part, weights=values, minlength=bins)[held] / count

    expected, found = mean(forecast), mean(measured)
    spread = np.maximum(mean(measured**2) - found**2, 0.0)
    error = np.sqrt(spread / np.maximum(count - 1, 1))
    return Reliability(expected, found, error, count)
