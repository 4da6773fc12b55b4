"""How a ratio and an advantage become what is maximised at a token: the one place where the losses differ.

All have the gradient `A grad log pi` at ratio 1; they differ in what becomes of it away from there.
"""

from __future__ import annotations

import torch
from torch import Tensor

from app.objective.options import SurrogateOptions


def bounded_objective(ratio: Tensor, advantages: Tensor, logprobs: Tensor, options: SurrogateOptions) -> Tensor:
    """What the chosen form maximises at each token, before importance weights.

    Args:
        ratio: `[T]`, with gradient.
        advantages: `[T]`.
        logprobs: `[T]`, log pi, with gradient; used by "cispo" alone.
        options: the form and its numbers.

    Returns:
        `[T]`:

        - "clip": `min(x A, clip(x, 1 - eps_low, 1 + eps_high) A)` (PPO, arXiv 1707.06347, equation 7; the asymmetric
          range is DAPO's, arXiv 2503.14476, equation 10), and with `dual_clip = c` at `A < 0` the larger of that and
          `c A` (arXiv 1912.09729; the two-sided clipping of INTELLECT-2, arXiv 2505.07291, is the same).
        - "cispo": `sg(min(x, cap)) A log pi` (MiniMax-M1, arXiv 2506.13585, without a lower bound, as in ScaleRL,
          arXiv 2510.13786).
        - "sapo": `4 / tau sigmoid(tau (x - 1)) A`, tau by the sign of `A` (arXiv 2511.20347).
    """
    match options.form:
        case "clip":
            return _clipped(ratio, advantages, options)
        case "cispo":
            return ratio.detach().clamp(max=options.cispo_cap) * advantages * logprobs
        case _:
            tau = torch.where(advantages > 0, options.sapo_tau_positive, options.sapo_tau_negative)
            return torch.sigmoid(tau * (ratio - 1)) * (4 / tau) * advantages


def clipped_tokens(ratio: Tensor, advantages: Tensor, options: SurrogateOptions) -> tuple[Tensor, Tensor]:
    """Bool `[T]` each: below and above the clip range where that stops the gradient; nowhere without a clip range."""
    if options.form != "clip":
        nowhere = torch.zeros_like(ratio, dtype=torch.bool)
        return nowhere, nowhere
    low, high = 1 - options.epsilon_low, 1 + options.epsilon_high
    return (ratio < low) & (advantages < 0), (ratio > high) & (advantages > 0)


def capped_tokens(ratio: Tensor, advantages: Tensor, options: SurrogateOptions) -> Tensor | None:
    """Bool `[T]`: beyond the form's second bound: CISPO's cap, or dual clip's at negative advantages; None without."""
    if options.form == "cispo":
        return ratio > options.cispo_cap
    return None if options.dual_clip is None else (ratio > options.dual_clip) & (advantages < 0)


def _clipped(ratio: Tensor, advantages: Tensor, options: SurrogateOptions) -> Tensor:
    low, high = 1 - options.epsilon_low, 1 + options.epsilon_high
    objective = torch.minimum(ratio * advantages, ratio.clamp(low, high) * advantages)
    if options.dual_clip is None:
        return objective
    return torch.where(advantages < 0, torch.maximum(objective, options.dual_clip * advantages), objective)
