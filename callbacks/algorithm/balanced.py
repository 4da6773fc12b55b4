"""Balanced online difficulty filtering: a preset of dynamic sampling."""

from __future__ import annotations

from callbacks.algorithm.dynamic_sampling import DynamicSampling


class Balanced(DynamicSampling):
    """Dynamic sampling that keeps groups of medium difficulty only (Bae et al. 2025, arXiv 2504.03380).

    Args:
        low: lowest success rate that passes.
        high: highest success rate that passes.
        max_refills: refill rounds in a step, at most; 0 only drops.
    """

    def __init__(self, low: float = 0.3, high: float = 0.7, max_refills: int = 10) -> None:
        super().__init__(low=low, high=high, max_refills=max_refills)
