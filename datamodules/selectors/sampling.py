"""Weighted draws without replacement."""

from __future__ import annotations

import numpy as np


def gumbel_top_k(logits: np.ndarray, k: int, rng: np.random.Generator) -> np.ndarray:
    """Draws `k` distinct positions, one after another, each with probability proportional to exp(logits) of those left.

    The `k` largest of `logits + Gumbel noise`, in falling order, have exactly that distribution (Kool et al. 2019,
    arXiv 1903.06059, section 2.3). Exponentials are never formed, so logits thousands apart are fine.

    Args:
        logits: float64 `[Q]` unnormalised log-probabilities.
        k: how many, `k <= Q`.
        rng: source of the noise.

    Returns:
        int64 `[k]`, in order of drawing.
    """
    noisy = logits + rng.gumbel(size=len(logits))
    if k == 0:
        return np.empty(0, dtype=np.int64)
    top = np.argpartition(-noisy, k - 1)[:k]
    return top[np.argsort(-noisy[top], kind="stable")]
