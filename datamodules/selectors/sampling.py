"""Draws and largest values without replacement."""

from __future__ import annotations

import numpy as np


def top_k(priorities: np.ndarray, k: int, rng: np.random.Generator, among: np.ndarray | None = None) -> np.ndarray:
    """The `k` largest, in falling order; equal ones are drawn and ordered at random.

    Args:
        priorities: float64 `[Q]`, no NaN; -inf is allowed and comes last.
        k: how many; at most as many as are in `among`.
        rng: decides between equal ones.
        among: bool `[Q]`: the positions to take from; None for all.

    Returns:
        int64 `[k]` distinct positions.
    """
    positions = np.arange(len(priorities)) if among is None else np.flatnonzero(among)
    if k == 0:
        return positions[:0]
    values = priorities if among is None else priorities[positions]
    threshold = np.partition(values, len(values) - k)[len(values) - k]
    above, tied = positions[values > threshold], positions[values == threshold]
    chosen = rng.permutation(np.concatenate([above, rng.choice(tied, k - len(above), replace=False)]))
    return chosen[np.argsort(-priorities[chosen], kind="stable")]


def gumbel(logits: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Noisy priorities whose `top_k` draws without replacement, each next with probability ~ exp(logits) of those left.

    `logits + Gumbel noise`: the order of its largest has exactly that distribution (Kool et al. 2019, arXiv 1903.06059,
    section 2.3). Exponentials are never formed, so logits thousands apart are fine.

    Args:
        logits: float64 `[Q]` unnormalised log-probabilities.
        rng: source of the noise.
    """
    return logits + rng.gumbel(size=len(logits))
