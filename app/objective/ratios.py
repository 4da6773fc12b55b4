"""Ratios of policies: the one that an update is measured by, and the one that links it to the behaviour policy."""

from __future__ import annotations

import torch
from torch import Tensor

from app.objective.options import SurrogateOptions

LOG_RATIO_BOUND = 20.0
"""Log-ratios are clamped to +-20 before `exp`: beyond it a ratio means nothing, and its gradient is 0."""


def bounded_exp(log_ratio: Tensor) -> Tensor:
    """`exp` of log-ratios within the bound; of any shape."""
    return log_ratio.clamp(-LOG_RATIO_BOUND, LOG_RATIO_BOUND).exp()


def update_ratio(log_ratio: Tensor, sequences: Tensor | None, options: SurrogateOptions) -> Tensor:
    """The ratio that the surrogate bounds: each token's own, or its sequence's geometric mean; `[T]`.

    The geometric mean is GSPO's `(pi(o) / pi_old(o))^(1 / |o|)` (arXiv 2507.18071, equation 7).
    """
    if options.ratio_level == "sequence" and sequences is not None:
        log_ratio = _sequence_sum(log_ratio, sequences) / _sequence_sum(torch.ones_like(log_ratio), sequences)
    return bounded_exp(log_ratio)


def importance_weight(log_importance: Tensor, sequences: Tensor | None, options: SurrogateOptions) -> Tensor:
    """`pi_old / mu` per token, or the product over each token's sequence, bounded by the cap; `[T]`."""
    if options.importance_level == "sequence" and sequences is not None:
        log_importance = _sequence_sum(log_importance, sequences)
    importance = bounded_exp(log_importance)
    if options.importance_mode == "mask":
        return torch.where(importance <= options.importance_cap, importance, 0.0)
    return importance.clamp(max=options.importance_cap)


def _sequence_sum(values: Tensor, sequences: Tensor) -> Tensor:
    """Sum over each token's sequence, `[T]`."""
    # A target as long as the tokens is long enough, and asking for the largest index would wait for the device.
    return torch.zeros_like(values).index_add(0, sequences, values)[sequences]
