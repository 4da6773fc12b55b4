"""The forms of the policy's objective: how a token counts whose probability has moved away from that of its sampler.

Each is one function from `MovedTokens` to the objective to maximise, `[T]`, before importance weights. All have the
gradient `A grad log pi` at ratio 1, but for `kl_cov`'s penalty; they differ away from there.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from app.objective.options import SurrogateOptions
from app.objective.ratios import LOG_RATIO_BOUND, bounded_exp, sequence_mean, sequence_sum

_LEAST_LOG_WEIGHT = math.log(1e-8)
"""VESPO's smallest sequence weight, that of its authors' code."""


@dataclass(frozen=True, slots=True, eq=False)
class MovedTokens:
    """What a form reads of the `T` generated tokens of a micro-batch.

    Attributes:
        logprobs: `[T]`, log pi, with gradient.
        center: `[T]`, log-probability under the policy that the ratio is relative to.
        ratio: `[T]`, `pi / center`, each token's own or its sequence's geometric mean, with gradient.
        advantages: `[T]`.
        importance: `[T]`, the importance weight as used; 1 where the ratio is relative to the behaviour policy.
        sequences: int `[T]`, the sequence of each token; required by "geo_mean" and "vespo".
    """

    logprobs: Tensor
    center: Tensor
    ratio: Tensor
    advantages: Tensor
    importance: Tensor
    sequences: Tensor | None = None

    @property
    def log_ratio(self) -> Tensor:
        """`log(pi / center)` of each token, `[T]`, with gradient."""
        return self.logprobs - self.center


def clip(tokens: MovedTokens, options: SurrogateOptions) -> Tensor:
    """Return `min(x A, clip(x, 1 - eps_low, 1 + eps_high) A)` (PPO, arXiv 1707.06347, equation 7).

    The asymmetric range is DAPO's (arXiv 2503.14476, equation 10). With `dual_clip = c` at `A < 0` it is the larger of
    that and `c A` (arXiv 1912.09729; the two-sided clipping of INTELLECT-2, arXiv 2505.07291, is the same).
    """
    low, high = 1 - options.epsilon_low, 1 + options.epsilon_high
    ratio, advantages = tokens.ratio, tokens.advantages
    objective = torch.minimum(ratio * advantages, ratio.clamp(low, high) * advantages)
    if options.dual_clip is None:
        return objective
    return torch.where(advantages < 0, torch.maximum(objective, options.dual_clip * advantages), objective)


def clip_cov(tokens: MovedTokens, options: SurrogateOptions) -> Tensor:
    """Return the objective of `clip`, with a few tokens left out that would lower the entropy most (arXiv 2505.22617).

    Candidates are tokens inside the clip range whose covariance (see `covariance`) lies strictly between `cov_low` and
    `cov_high`; the share `cov_fraction` of all tokens, at least one, is left out. The paper draws them at random; here
    they are evenly spaced among the candidates, so that a step depends on its batch alone.
    """
    low, high = clipped_tokens(tokens, options)
    moved = covariance(tokens)
    candidates = ((moved > options.cov_low) & (moved < options.cov_high) & ~low & ~high).nonzero().squeeze(-1)
    chosen = min(_count(tokens, options), len(candidates))
    places = torch.arange(chosen, device=candidates.device) * len(candidates) // max(1, chosen)
    return clip(tokens, options).index_fill(0, candidates[places], 0.0)


def kl_cov(tokens: MovedTokens, options: SurrogateOptions) -> Tensor:
    """Return `x A`, less `kl_cov_coef |log x|` at the tokens with the largest covariance (arXiv 2505.22617).

    They are the share `cov_fraction` of all tokens, at least one.
    """
    chosen = covariance(tokens).topk(min(_count(tokens, options), len(tokens.ratio))).indices
    penalty = torch.zeros_like(tokens.ratio).index_fill(0, chosen, options.kl_cov_coef)
    return tokens.ratio * tokens.advantages - penalty * tokens.log_ratio.abs()


def cispo(tokens: MovedTokens, options: SurrogateOptions) -> Tensor:
    """Return `sg(clip(x, floor, cap)) A log pi` (MiniMax-M1, arXiv 2506.13585, equation 4).

    A floor of 0 is none, as in ScaleRL (arXiv 2510.13786).
    """
    return tokens.ratio.detach().clamp(options.cispo_floor, options.cispo_cap) * tokens.advantages * tokens.logprobs


def sapo(tokens: MovedTokens, options: SurrogateOptions) -> Tensor:
    """Return `4 / tau sigmoid(tau (x - 1)) A`, tau by the sign of `A` (arXiv 2511.20347)."""
    tau = torch.where(tokens.advantages > 0, options.sapo_tau_positive, options.sapo_tau_negative)
    return torch.sigmoid(tau * (tokens.ratio - 1)) * (4 / tau) * tokens.advantages


def dppo_tv(tokens: MovedTokens, options: SurrogateOptions) -> Tensor:
    """Return `sg(min(x, cap)) A log pi` within a bound on total variation, else 0 (DPPO, arXiv 2602.04879).

    The variation of a token is the change of its probability `p - p_center`: at most `epsilon_high` at positive
    advantages, and at least `-epsilon_low` at others.
    """
    low, high = clipped_tokens(tokens, options)
    weight = tokens.ratio.detach().clamp(max=options.dppo_cap).masked_fill(low | high, 0.0)
    return weight * tokens.advantages * tokens.logprobs


def geo_mean(tokens: MovedTokens, options: SurrogateOptions) -> Tensor:
    """Return the geometric mean of the sequence's clipped ratios, times `A` (GMPO, arXiv 2507.20673, equation 4).

    Log-ratios are clipped token by token to `[-epsilon_low, epsilon_high]`, on the side that the advantage pushes to.
    The published loss weighs sequences equally: `aggregation: sequence`.
    """
    assert tokens.sequences is not None
    log_ratio, sign = tokens.log_ratio, tokens.advantages.sign()
    bounded = log_ratio.clamp(-options.epsilon_low, options.epsilon_high)
    pessimistic = sign * torch.minimum(sign * log_ratio, sign * bounded)
    return bounded_exp(sequence_mean(pessimistic, tokens.sequences)) * tokens.advantages


def gpg(tokens: MovedTokens, options: SurrogateOptions) -> Tensor:
    """Return `A log pi`, without ratio and bound (GPG, arXiv 2504.02546; REINFORCE)."""
    return tokens.advantages * tokens.logprobs


def vespo(tokens: MovedTokens, options: SurrogateOptions) -> Tensor:
    """Return `sg(phi(w)) A log pi` with `phi(w) = e^lambda w^k e^(-lambda w)` (VESPO, arXiv 2602.10693).

    `w` is the product over the sequence of ratios and importance weights (or that of the sequence), so that no other
    weight is applied; `k` and lambda depend on the sign of `A`.
    """
    assert tokens.sequences is not None
    positive = tokens.advantages >= 0
    power = torch.where(positive, options.vespo_k_positive, options.vespo_k_negative)
    decay = torch.where(positive, options.vespo_lambda_positive, options.vespo_lambda_negative)
    moved = tokens.log_ratio.detach().clamp(-LOG_RATIO_BOUND, LOG_RATIO_BOUND)
    importance = tokens.importance.log().clamp(_LEAST_LOG_WEIGHT, LOG_RATIO_BOUND)
    over = sequence_mean if options.importance_level == "sequence" else sequence_sum  # each token has the sequence's
    log_weight = sequence_sum(moved, tokens.sequences) + over(importance, tokens.sequences)
    log_weight = log_weight.clamp(_LEAST_LOG_WEIGHT, LOG_RATIO_BOUND)
    phi = (decay + power * log_weight - decay * log_weight.exp()).exp()
    return phi * tokens.advantages * tokens.logprobs


FORMS: dict[str, Callable[[MovedTokens, SurrogateOptions], Tensor]] = {
    form.__name__: form for form in (clip, cispo, sapo, clip_cov, kl_cov, dppo_tv, geo_mean, gpg, vespo)
}


def covariance(tokens: MovedTokens) -> Tensor:
    """Return each token's share of the covariance of advantage and log-probability, `[T]`, without gradient.

    Where it is large, an update lowers the policy's entropy most (arXiv 2505.22617, equation 12). Means are those over
    the tokens of the micro-batch, as in verl.
    """
    logprobs = tokens.logprobs.detach()
    return (tokens.advantages - tokens.advantages.mean()) * (logprobs - logprobs.mean())


def clipped_tokens(tokens: MovedTokens, options: SurrogateOptions) -> tuple[Tensor, Tensor]:
    """Return masks, bool `[T]`, of tokens below and above the form's range (if it has one) whose gradient it stops."""
    match options.form:
        case "clip" | "clip_cov":
            moved, low, high = tokens.ratio, 1 - options.epsilon_low, 1 + options.epsilon_high
        case "dppo_tv":
            moved, low, high = tokens.logprobs.exp() - tokens.center.exp(), -options.epsilon_low, options.epsilon_high
        case "geo_mean":
            moved, low, high = tokens.log_ratio, -options.epsilon_low, options.epsilon_high
        case _:
            none = torch.zeros_like(tokens.ratio, dtype=torch.bool)
            return none, none
    return (moved < low) & (tokens.advantages < 0), (moved > high) & (tokens.advantages > 0)


def capped_tokens(tokens: MovedTokens, options: SurrogateOptions) -> Tensor | None:
    """Return the mask, bool `[T]`, of tokens beyond a form's second bound; None if it has none.

    That is the cap of "cispo" and "dppo_tv", or dual clip's at negative advantages.
    """
    match options.form:
        case "cispo":
            return tokens.ratio > options.cispo_cap
        case "dppo_tv":
            return tokens.ratio > options.dppo_cap
        case _:
            beyond = options.dual_clip
            return None if beyond is None else (tokens.ratio > beyond) & (tokens.advantages < 0)


def _count(tokens: MovedTokens, options: SurrogateOptions) -> int:
    return max(1, int(options.cov_fraction * len(tokens.ratio)))
