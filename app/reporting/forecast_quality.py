"""How well a forecast met what was measured."""

from __future__ import annotations

import numpy as np


def pearson(forecast: np.ndarray, measured: np.ndarray) -> float:
    """Correlation of two float arrays `[N]`; NaN when either does not vary or there are fewer than two values."""
    if len(forecast) < 2 or np.ptp(forecast) == 0 or np.ptp(measured) == 0:
        return float("nan")
    return float(np.corrcoef(forecast, measured)[0, 1])


def brier(forecast: np.ndarray, measured: np.ndarray) -> float:
    """Mean squared error of forecast success rates `[N]`; NaN for none."""
    return float(np.mean((forecast - measured) ** 2)) if len(forecast) else float("nan")


def informative_probability(success: np.ndarray, samples: int) -> np.ndarray:
    """float64 `[N]`: chance that `samples` independent completions are neither all right nor all wrong.

    `1 - p^G - (1 - p)^G` for success rates `p` `[N]`, clipped to [0, 1].
    """
    right = np.clip(success, 0.0, 1.0)
    return 1.0 - right**samples - (1.0 - right) ** samples


def spearman(forecast: np.ndarray, measured: np.ndarray) -> float:
    """Rank correlation of two float arrays `[N]`, equal values sharing their mean rank; NaN as for `pearson`."""
    return pearson(_mean_ranks(forecast), _mean_ranks(measured))


def _mean_ranks(values: np.ndarray) -> np.ndarray:
    _, group, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return (last - (counts - 1) / 2)[group]
