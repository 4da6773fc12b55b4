"""One policy loss for every variant of GRPO, on fresh, off-policy and replayed tokens.

    loss = sum_t weight_t * ( -c_t f(x_t, A_t) + beta KL_t - eta entropy_t )

`f` is one of the `forms`. The ratio `x` is each token's own or its sequence's geometric mean, and is relative to one of
two policies:

- "old": `x = w = pi / pi_old` and `c = rho_old = pi_old / mu`, truncated or masked and without gradient. This is
  decoupled PPO (arXiv 2110.00641, equation 5) with truncated importance sampling; `c x` is `rho = pi / mu` clipped to
  `rho_old (1 - eps_low) .. rho_old (1 + eps_high)`, so the trust region is around the current policy while the weight
  stays relative to the behaviour policy. The code of DOTS's authors does this without a limit (`importance_cap: .inf`).
- "behaviour": `x = rho = pi / mu` and `c = 1` (DOTS, arXiv 2506.05316, the replay loss as printed).

On policy, `mu = pi_old` and both are GRPO (arXiv 2402.03300, equation 3).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from app.objective.forms import FORMS, MovedTokens, capped_tokens, clipped_tokens
from app.objective.options import SurrogateOptions
from app.objective.ratios import (
    LOG_RATIO_BOUND,
    bounded_exp,
    importance_weight,
    kl_estimate,
    sequence_mean,
    update_ratio,
)
from app.objective.statistics import Statistics, TokenTerms


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
        """Statistics of all tokens; use `terms.statistics(mask)` for some of them."""
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
    """Compute the loss at the top of this file.

    Args:
        logprobs: `[T]`, log pi, with gradient.
        behaviour_logprobs: `[T]`, log mu.
        advantages: `[T]`, the sequence's advantage at each of its tokens.
        weights: `[T]`, from `ratios.token_weights`.
        options: which loss.
        old_logprobs: `[T]`, log pi_old; None before the first update on the batch, when it equals `logprobs`.
        sequences: int `[T]`, the sequence of each token; required if `options.needs_sequences`. All tokens of a
            sequence must be in the same call.
        entropy: `[T]`, measured, rewarded when `entropy_coef` is not 0, and required by `top_entropy_quantile`.
        reference_logprobs: `[T]`, log ref; required when `beta` is not 0.

    Raises:
        ValueError: a tensor that the options need is missing, or a shape is not `[T]`.
    """
    old = logprobs.detach() if old_logprobs is None else old_logprobs.detach()
    if options.beta and reference_logprobs is None:
        raise ValueError(f"beta={options.beta} needs reference_logprobs, which is None. Pass it or set beta to 0.")
    if (options.entropy_coef or options.top_entropy_quantile < 1) and entropy is None:
        raise ValueError(
            f"entropy_coef={options.entropy_coef} and top_entropy_quantile={options.top_entropy_quantile} need "
            "entropy, which is None. Pass it, or set them to 0 and 1."
        )
    if options.needs_sequences and sequences is None:
        raise ValueError(f"The loss with {options} needs the sequence index of every token. Pass sequences.")
    given = (logprobs, behaviour_logprobs, advantages, weights, old, sequences, entropy, reference_logprobs)
    shapes = [tuple(one.shape) for one in given if one is not None]
    if logprobs.ndim != 1 or len(set(shapes)) != 1:
        raise ValueError(f"shapes {shapes}: expected all to be [T]")

    log_importance, center = old - behaviour_logprobs, old
    if options.clip_center == "old":
        together, cap = sequences if options.importance_level == "sequence" else None, options.importance_cap
        importance = factor = importance_weight(log_importance, together, cap, options.importance_mode)
    else:
        center = behaviour_logprobs
        importance, factor = bounded_exp(log_importance), torch.ones_like(old)
    ratio = update_ratio(logprobs - center, sequences if options.ratio_level == "sequence" else None)
    reference = None if reference_logprobs is None else reference_logprobs.detach()
    kl = None if reference is None else kl_estimate(logprobs, reference, options.kl_estimator)
    tokens = MovedTokens(logprobs, center, ratio, advantages, factor, sequences)
    per_token = -FORMS[options.form](tokens, options)
    if options.form != "vespo":  # whose weight holds the importance of the whole sequence
        per_token = factor * per_token
    kept = kept_tokens(logprobs.detach(), behaviour_logprobs, advantages, options, sequences, entropy)
    if kept is not None:
        per_token = torch.where(kept, per_token, 0.0)
    if kl is not None and options.beta:
        per_token = per_token + options.beta * (factor * ratio * kl if options.kl_corrected else kl)
    if entropy is not None and options.entropy_coef:
        per_token = per_token - options.entropy_coef * entropy

    clipped_low, clipped_high = clipped_tokens(tokens, options)
    terms = TokenTerms(
        ratio=ratio.detach(),
        log_update=(logprobs.detach() - old).clamp(-LOG_RATIO_BOUND, LOG_RATIO_BOUND),
        importance=importance,
        logp_difference=log_importance.abs(),
        clipped_low=clipped_low,
        clipped_high=clipped_high,
        capped=capped_tokens(tokens, options),
        entropy=None if entropy is None else entropy.detach(),
        kl=None if kl is None else kl.detach(),
    )
    return PolicyLoss((weights * per_token).sum(), terms)


def kept_tokens(
    logprobs: Tensor,
    behaviour_logprobs: Tensor,
    advantages: Tensor,
    options: SurrogateOptions,
    sequences: Tensor | None,
    entropy: Tensor | None,
) -> Tensor | None:
    """Return the mask, bool `[T]`, of tokens whose objective counts; None if all do.

    Off-policy sequence masking (DeepSeek-V3.2, arXiv 2512.02556, equation 9) leaves out sequences with a negative
    advantage whose mean `log(mu / pi)` is above `off_policy_mask_threshold`. `top_entropy_quantile` (arXiv 2506.01939)
    keeps that share of the micro-batch's tokens, those of the highest entropy.
    """
    kept = None
    if options.off_policy_mask_threshold is not None:
        assert sequences is not None
        drift = sequence_mean(behaviour_logprobs - logprobs, sequences)
        kept = (advantages >= 0) | (drift <= options.off_policy_mask_threshold)
    if options.top_entropy_quantile < 1 and len(logprobs):
        assert entropy is not None
        high = entropy.detach() >= entropy.detach().quantile(1 - options.top_entropy_quantile)
        kept = high if kept is None else kept & high
    return kept
