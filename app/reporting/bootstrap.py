"""Intervals of a mean over prompts, by drawing the prompts again."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from datamodules.seeding import generator

DRAWS = 10_000
"""Number of samples of the prompts."""
LEVEL = 0.95
"""Coverage of the intervals."""
_MOST_NUMBERS = 2_000_000
"""Largest number of drawn prompts that are held at once."""


def bootstrap_means(values: Sequence[float], *context: str | int) -> np.ndarray:
    """Return the means of `DRAWS` samples of as many values, drawn with replacement: float64 `[DRAWS]`.

    Args:
        values: the value of each prompt, at least one.
        context: what the seed is derived from (`datamodules.seeding.generator`).
    """
    given, random = np.asarray(values, dtype=np.float64), generator(*context)
    rows = max(1, _MOST_NUMBERS // len(given))
    parts = [
        given[random.integers(len(given), size=(min(rows, DRAWS - done), len(given)))].mean(axis=1)
        for done in range(0, DRAWS, rows)
    ]
    return np.concatenate(parts)


def interval(means: np.ndarray) -> list[float]:
    """Return the percentile interval of bootstrapped means, [low, high]: the middle `LEVEL` of them.

    It has no width where all prompts have the same value.
    """
    tail = (1 - LEVEL) / 2
    return [float(bound) for bound in np.quantile(means, [tail, 1 - tail])]
