"""How many completions each prompt gets out of a budget, given what is known of its success rate."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import numpy as np

Gain = Literal["improvement", "variance", "equal"]
GAINS: Mapping[Gain, tuple[int, int]] = {"improvement": (1, 2), "variance": (1, 1), "equal": (0, 0)}
"""Exponents i and j of p^i (1 - p)^j, what an informative group of a prompt is worth."""
_LEAST = 1e-3
"""Smallest distance of an expected success rate from 0 and 1: a prompt that failed so far may yet be solved."""
_MOST_VARIANCE = 0.95
"""Largest variance of a success rate of mean m, relative to m (1 - m), which only rates of 0 and 1 have."""


def marginal_values(mean: np.ndarray, deviation: np.ndarray, gain: Gain, smallest: int, largest: int) -> np.ndarray:
    """Return what a completion adds to the expected worth of each prompt's group, float64 `[B, largest - smallest]`.

    A group of n completions is worth `v(n) = (1 - p^n - (1 - p)^n) p^i (1 - p)^j` (Knapsack RL, arXiv 2509.25849), the
    probability that it is informative times its gain, so that `v(n + 1) - v(n)` is `p^n (1 - p) + (1 - p)^n p` times
    the gain. Column k is its mean for `n = smallest + k`, where p is Beta distributed; it does not increase with n.

    Args:
        mean: float64 `[B]`, expected success rates.
        deviation: float64 `[B]`, their standard deviations; 0 for known rates.
        gain: "improvement" is `p (1 - p)^2`, "variance" is `p (1 - p)`, and "equal" is 1.
        smallest: first `n`, at least 1.
        largest: last `n + 1`.
    """
    i, j = GAINS[gain]
    mean = np.clip(mean, _LEAST, 1 - _LEAST)[:, None]
    room = mean * (1 - mean)
    variance = np.minimum(deviation[:, None] ** 2, _MOST_VARIANCE * room)
    # With e = 1 / (a + b), E[p^x (1 - p)^y] of Beta(a, b) is the product of m + k e over k < x and of 1 - m + k e over
    # k < y, divided by that of 1 + k e over k < x + y.
    steps = variance / (room - variance) * np.arange(largest + i + j + 1)
    right, wrong, both = (
        np.pad(np.log(first + steps).cumsum(axis=1), ((0, 0), (1, 0))) for first in (mean, 1 - mean, np.ones_like(mean))
    )
    n = np.arange(smallest, largest)
    total = both[:, n + 1 + i + j]
    return np.exp(right[:, n + i] + wrong[:, [1 + j]] - total) + np.exp(right[:, [1 + i]] + wrong[:, n + j] - total)


def allocate(marginals: np.ndarray, smallest: int, budget: int) -> np.ndarray:
    """Return the sizes of the groups, int64 `[B]`, whose expected worth is the largest for a number of completions.

    Because what a completion adds does not increase, the largest additions are those of an optimum.

    Args:
        marginals: `[B, K]` as from `marginal_values`.
        smallest: least size; the largest is `smallest + K`.
        budget: completions in all, from `B smallest` to `B (smallest + K)`.
    """
    values = np.minimum.accumulate(marginals, axis=1)  # which rounding may have disturbed
    prompts, numbers = np.indices(values.shape)
    order = np.lexsort((prompts.ravel(), numbers.ravel(), -values.ravel()))
    given = prompts.ravel()[order[: budget - smallest * len(values)]]
    return smallest + np.bincount(given, minlength=len(values))
