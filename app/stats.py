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
