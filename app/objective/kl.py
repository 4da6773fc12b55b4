"""Estimates of the KL divergence from the reference policy, one token at a time."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from app.objective.ratios import LOG_RATIO_BOUND


def kl_estimate(logprobs: Tensor, reference_logprobs: Tensor, estimator: Literal["k1", "k2", "k3"]) -> Tensor:
    """KL(pi || ref) at each sampled token `[T]`: k1 `-x`, k2 `x^2 / 2`, k3 `e^x - 1 - x`, where `x = log(ref / pi)`.

    As a *value*, k1 and k3 are unbiased under samples from pi (http://joschu.net/blog/kl-approx.html). As a *loss*
    their gradients differ: k2's expected gradient is that of KL(pi || ref), k3's is that of KL(ref || pi), and k1's is
    0. Multiplied by the ratio (`SurrogateOptions.kl_corrected`) k1 and k3 both have the gradient of KL(pi || ref)
    (DeepSeek-V3.2, arXiv 2512.02556, section 3.1).
    """
    x = (reference_logprobs - logprobs).clamp(-LOG_RATIO_BOUND, LOG_RATIO_BOUND)
    match estimator:
        case "k1":
            return -x
        case "k2":
            return x.square() / 2
        case _:
            return torch.expm1(x) - x
