"""Measure how well forecast success rates agree with measured ones."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


def pearson(forecast: np.ndarray, measured: np.ndarray) -> float:
    """Return the correlation of two float arrays `[N]`; NaN when one is constant or `N` is below 2."""
    if len(forecast) < 2 or np.ptp(forecast) == 0 or np.ptp(measured) == 0:
        return float("nan")
    return float(np.corrcoef(forecast, measured)[0, 1])


def spearman(forecast: np.ndarray, measured: np.ndarray) -> float:
    """Return the rank correlation of two float arrays `[N]`, ties sharing their mean rank; NaN as for `pearson`."""
    from scipy.stats import rankdata  # slow to import, and trainings do not need it

    return pearson(rankdata(forecast), rankdata(measured))


def brier(forecast: np.ndarray, measured: np.ndarray) -> float:
    """Return the mean squared error of forecast success rates `[N]`; NaN for none."""
    return float(np.mean((forecast - measured) ** 2)) if len(forecast) else float("nan")


def informative_probability(success: np.ndarray, samples: int) -> np.ndarray:
    """Return the chance `1 - p^G - (1 - p)^G` that `samples` completions are neither all right nor all wrong, `[N]`."""
    right = np.clip(success, 0.0, 1.0)
    return 1.0 - right**samples - (1.0 - right) ** samples


@dataclass(frozen=True, slots=True, eq=False)
class Reliability:
    """Forecasts binned by value against the outcomes, over the `M` bins that hold any."""

    forecast: np.ndarray  # float64 `[M]`, mean forecast of each bin, rising
    measured: np.ndarray  # float64 `[M]`, mean measured success of each bin
    standard_error: np.ndarray  # float64 `[M]` of `measured`; 0 for a bin of one
    count: np.ndarray  # int64 `[M]`

    @property
    def error(self) -> float:
        """Expected calibration error (Guo et al. 2017, arXiv 1706.04599, eq. 3), or NaN for no forecast."""
        if not len(self.count):
            return float("nan")
        return float(np.average(np.abs(self.measured - self.forecast), weights=self.count))


def reliability(forecast: np.ndarray, measured: np.ndarray, bins: int = 10) -> Reliability:
    """Bin forecasts `[N]` into equal parts of [0, 1] and average the measured outcomes `[N]` of each bin.

    A forecast on a border belongs to the upper bin, 1.0 to the last.
    """
    part = np.clip((forecast * bins).astype(np.int64), 0, bins - 1)
    count = np.bincount(part, minlength=bins)
    held = np.flatnonzero(count)
    count = count[held]

    def mean(values: np.ndarray) -> np.ndarray:
        return np.bincount(part, weights=values, minlength=bins)[held] / count

    found = mean(measured)
    spread = np.maximum(mean(measured**2) - found**2, 0.0)
    return Reliability(mean(forecast), found, np.sqrt(spread / np.maximum(count - 1, 1)), count)
