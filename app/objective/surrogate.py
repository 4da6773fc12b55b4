"""One clipped policy loss for on-policy, off-policy and replayed tokens, and what each token counts in it.

    loss = sum_t weight_t * ( -c_t min(x_t A_t, clip(x_t, 1 - eps_low, 1 + eps_high) A_t) + beta KL_t - eta entropy_t )

The clip range is centred on one of two policies:

- "old": `x = w = pi / pi_old` and `c = rho_old = pi_old / mu`, truncated and without gradient. This is decoupled PPO
  (arXiv 2110.00641, equation 5) with truncated importance sampling; `c x` is `rho = pi / mu` clipped to
  `rho_old (1 - eps_low) .. rho_old (1 + eps_high)`, so the trust region is around the current policy while the weight
  stays relative to the behaviour policy. The authors' code of DOTS does this.
- "behaviour": `x = rho = pi / mu` and `c = 1` (DOTS, arXiv 2506.05316, the replay loss as printed).

On policy `mu = pi_old` and both are GRPO (arXiv 2402.03300, equation 3); `eps_high > eps_low` is DAPO's clip-higher
(arXiv 2503.14476, equation 10).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from app.objective.statistics import Statistics, TokenTerms
from datamodules.errors import UserError, nearest

Aggregation = Literal["token", "sequence", "constant"]
AGGREGATIONS = ("token", "sequence", "constant")
LOG_RATIO_BOUND = 20.0
"""Log-ratios are clamped to +-20 before `exp`: beyond it a ratio means nothing, and its gradient is 0."""


@dataclass(frozen=True)
class SurrogateOptions:
    """Which loss of the family.

    Args:
        epsilon_low: the clip range reaches down to `1 - epsilon_low`.
        epsilon_high: the clip range reaches up to `1 + epsilon_high`.
        clip_center: policy that the clip range is around: "old" (before this update) or "behaviour" (that sampled).
        importance_cap: largest importance weight `pi_old / mu`; `.inf` for none. Only with `clip_center: old`.
        importance_level: "token", or "sequence": the product over the completion, which is what unbiasedness needs
            and what varies most.
        importance_mode: what happens above the cap: "truncate" to it (TIS), or "mask": the weight becomes 0 (MIS).
        beta: factor of the KL to the reference policy; 0 needs no reference.
        kl_estimator: "k1", "k2" or "k3" (http://joschu.net/blog/kl-approx.html).
        entropy_coef: factor of the entropy bonus.
    """

    epsilon_low: float = 0.2
    epsilon_high: float = 0.2
    clip_center: Literal["old", "behaviour"] = "old"
    importance_cap: float = 2.0
    importance_level: Literal["token", "sequence"] = "token"
    importance_mode: Literal["truncate", "mask"] = "truncate"
    beta: float = 0.0
    kl_estimator: Literal["k1", "k2", "k3"] = "k3"
    entropy_coef: float = 0.0

    def __post_init__(self) -> None:
        numbers = [
            ("epsilon_low", 0 <= self.epsilon_low <= 1, "in [0, 1]"),
            ("epsilon_high", self.epsilon_high >= 0, "0 or more"),
            ("importance_cap", self.importance_cap > 0, "above 0"),
            ("beta", self.beta >= 0, "0 (no reference) or more"),
        ]
        for name, fine, expected in numbers:
            if not fine:
                raise UserError(f"{name}={getattr(self, name)}: expected {expected}")
        names = [
            ("clip_center", ("old", "behaviour")),
            ("importance_level", ("token", "sequence")),
            ("importance_mode", ("truncate", "mask")),
            ("kl_estimator", ("k1", "k2", "k3")),
        ]
        for name, valid in names:
            given = getattr(self, name)
            if given not in valid:
                raise UserError(f"{name}={given!r}: expected one of {', '.join(valid)}; {nearest(str(given), valid)}")


@dataclass(frozen=True, slots=True, eq=False)
class PolicyLoss:
    """The loss of one micro-batch.

    Attributes:
        loss: scalar with gradient: a weighted **sum** over tokens, so that micro-batches add up.
        terms: its parts per token, without gradient.
    """

    loss: Tensor
    terms: TokenTerms

    @property
    def statistics(self) -> Statistics:
        """Over all tokens; `terms.statistics(mask)` gives them for some, the replayed ones for instance."""
        return self.terms.statistics()


def policy_loss(
    logprobs: Tensor,
    behaviour_logprobs: Tensor,
    advantages: Tensor,
    weights: Tensor,
    options: SurrogateOptions,
    *,
    old_logprobs: Tensor | None = None,
    sequences: Tensor | None = None,
    entropy: Tensor | None = None,
    reference_logprobs: Tensor | None = None,
) -> PolicyLoss:
    """The loss at the top of this file.

    Args:
        logprobs: `[T]`, log pi, with gradient.
        behaviour_logprobs: `[T]`, log mu.
        advantages: `[T]`, each sequence's advantage at every one of its tokens.
        weights: `[T]`, from `token_weights`.
        options: which loss.
        old_logprobs: `[T]`, log pi_old; None while the policy has not been updated since, when it is `logprobs` itself.
        sequences: int `[T]`, which sequence a token belongs to; needed for `importance_level: sequence`. All tokens
            of a sequence must be in the same call.
        entropy: `[T]`, measured, and rewarded when `entropy_coef` is not 0.
        reference_logprobs: `[T]`, log ref; needed when `beta` is not 0.

    Raises:
        ValueError: a tensor that the options need is missing, or a shape other than `[T]`.
    """
    old = logprobs.detach() if old_logprobs is None else old_logprobs.detach()
    _check(options, logprobs, behaviour_logprobs, advantages, weights, old, sequences, entropy, reference_logprobs)
    log_importance = old - behaviour_logprobs
    if options.clip_center == "old":
        center = old
        importance = factor = _importance(log_importance, sequences, options)
    else:
        center = behaviour_logprobs
        importance, factor = _ratio(log_importance), torch.ones_like(old)
    ratio = _ratio(logprobs - center)
    low, high = 1 - options.epsilon_low, 1 + options.epsilon_high
    per_token = -factor * torch.minimum(ratio * advantages, ratio.clamp(low, high) * advantages)

    kl = None
    if reference_logprobs is not None:
        kl = kl_estimate(logprobs, reference_logprobs.detach(), options.kl_estimator)
        if options.beta:
            per_token = per_token + options.beta * kl
    if entropy is not None and options.entropy_coef:
        per_token = per_token - options.entropy_coef * entropy

    terms = TokenTerms(
        ratio=ratio.detach(),
        log_update=(logprobs.detach() - old).clamp(-LOG_RATIO_BOUND, LOG_RATIO_BOUND),
        importance=importance,
        logp_difference=log_importance.abs(),
        clipped_low=(ratio < low) & (advantages < 0),
        clipped_high=(ratio > high) & (advantages > 0),
        entropy=None if entropy is None else entropy.detach(),
        kl=None if kl is None else kl.detach(),
    )
    return PolicyLoss((weights * per_token).sum(), terms)


def kl_estimate(logprobs: Tensor, reference_logprobs: Tensor, estimator: Literal["k1", "k2", "k3"]) -> Tensor:
    """KL(pi || ref) at each sampled token `[T]`: k1 `-x`, k2 `x^2 / 2`, k3 `e^x - 1 - x`, where `x = log(ref / pi)`."""
    x = (reference_logprobs - logprobs).clamp(-LOG_RATIO_BOUND, LOG_RATIO_BOUND)
    match estimator:
        case "k1":
            return -x
        case "k2":
            return x.square() / 2
        case _:
            return torch.expm1(x) - x


def token_weights(
    lengths: Tensor,
    aggregation: Aggregation = "token",
    *,
    max_completion_length: int | None = None,
    total_tokens: float | None = None,
    total_sequences: float | None = None,
) -> Tensor:
    """What every token of each sequence counts in the loss, so that the loss is a plain sum.

    The totals are those of the whole global mini-batch: over all micro-batches and ranks, and with the sequences whose
    forward pass is left out because their advantage is 0. Where gradients are then averaged over ranks, multiply the
    weights by the number of ranks.

    Args:
        lengths: int `[N]`: completion tokens of each sequence.
        aggregation: "token": mean over all tokens (DAPO; BNPO when the totals are a micro-batch's own); "sequence":
            mean over a sequence's tokens, then over sequences (GRPO); "constant": sum over tokens divided by
            `max_completion_length` x sequences (Dr. GRPO).
        max_completion_length: for "constant".
        total_tokens: of the global mini-batch; those of `lengths` by default.
        total_sequences: of the global mini-batch; `N` by default.

    Returns:
        Float32 `[N]` (float64 for float64 lengths); the same for all tokens of a sequence.

    Raises:
        UserError: an unknown aggregation.
        ValueError: "constant" without `max_completion_length`.
    """
    if aggregation not in AGGREGATIONS:
        choice = f"expected one of {', '.join(AGGREGATIONS)}; {nearest(str(aggregation), AGGREGATIONS)}"
        raise UserError(f"aggregation={aggregation!r}: {choice}")
    lengths = lengths.to(torch.promote_types(lengths.dtype, torch.float32))
    sequences = float(len(lengths)) if total_sequences is None else total_sequences
    if aggregation == "token":
        tokens = float(lengths.sum()) if total_tokens is None else total_tokens
        return torch.full_like(lengths, 1 / max(tokens, 1.0))
    if aggregation == "sequence":
        return 1 / (lengths.clamp(min=1) * max(sequences, 1.0))
    if max_completion_length is None:
        raise ValueError("aggregation 'constant' needs max_completion_length")
    return torch.full_like(lengths, 1 / (max_completion_length * max(sequences, 1.0)))


def _ratio(log_ratio: Tensor) -> Tensor:
    return log_ratio.clamp(-LOG_RATIO_BOUND, LOG_RATIO_BOUND).exp()


def _importance(log_importance: Tensor, sequences: Tensor | None, options: SurrogateOptions) -> Tensor:
    """`pi_old / mu` per token, or the product over each token's sequence, bounded by the cap; `[T]`."""
    if options.importance_level == "sequence" and sequences is not None:
        # A target as long as the tokens is long enough, and asking for the largest index would wait for the device.
        sums = torch.zeros_like(log_importance).index_add(0, sequences, log_importance)
        log_importance = sums[sequences]
    importance = _ratio(log_importance)
    if options.importance_mode == "mask":
        return torch.where(importance <= options.importance_cap, importance, 0.0)
    return importance.clamp(max=options.importance_cap)


def _check(options: SurrogateOptions, logprobs: Tensor, *others: Tensor | None) -> None:
    *_, sequences, _, reference_logprobs = others
    if options.beta and reference_logprobs is None:
        raise ValueError(f"beta={options.beta} needs reference_logprobs")
    if options.importance_level == "sequence" and sequences is None:
        raise ValueError("importance_level 'sequence' needs the sequence index of every token")
    shapes = [tuple(other.shape) for other in (logprobs, *others) if other is not None]
    if logprobs.ndim != 1 or len(set(shapes)) != 1:
        raise ValueError(f"shapes {shapes}: expected all to be [T]")
