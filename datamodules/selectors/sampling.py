"""Random and top-k choices without replacement."""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from datamodules.seeding import generator


def top_k(priorities: np.ndarray, k: int, rng: np.random.Generator, among: np.ndarray | None = None) -> np.ndarray:
    """Return the int64 `[k]` positions of the `k` largest priorities in descending order, ties in random order.

    `priorities` are float64 `[Q]` without NaN; -inf comes last. `among` is the bool `[Q]` mask of eligible positions,
    at least `k`; None for all.
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
    """Return `logits + Gumbel noise`, whose `top_k` samples without replacement with probabilities ~ exp(logits).

    The order of the largest values follows the sequential distribution over the remaining prompts (Kool et al. 2019,
    arXiv 1903.06059, section 2.3). No exponential is formed, so logits thousands apart do not underflow.
    """
    return logits + rng.gumbel(size=len(logits))


@lru_cache(maxsize=4)
def pass_ranks(seed: int, method: str, number: int, size: int) -> np.ndarray:
    """Return the rank of every prompt in the shuffled order of pass `number` over the pool, int64 `[Q]`, read-only.

    The order depends on the run's seed, the method's name and the arguments only, so it needs no saved state.
    """
    order = generator(seed, method, "pass", number).permutation(size)
    ranks = np.empty_like(order)
    ranks[order] = np.arange(size)
    ranks.flags.writeable = False
    return ranks
