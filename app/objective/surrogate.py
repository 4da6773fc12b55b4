"""One policy loss for every variant of GRPO, on fresh, off-policy and replayed tokens.

    loss = sum_t weight_t * ( -c_t f(x_t, A_t) + beta KL_t - eta entropy_t )

`f` is the form (`forms`): the clipped objective, CISPO's or SAPO's. The ratio `x` is each token's own or its sequence's
geometric mean (`ratios`), and is relative to one of two policies:

- "old": `x = w = pi / pi_old` and `c = rho_old = pi_old / mu`, truncated or masked and without gradient. This is
  decoupled PPO (arXiv 2110.00641, equation 5) with truncated importance sampling; `c x` is `rho = pi / mu` clipped to
  `rho_old (1 - eps_low) .. rho_old (1 + eps_high)`, so the trust region is around the current policy while the weight
  stays relative to the behaviour policy. The authors' code of DOTS does this.
- "behaviour": `x = rho = pi / mu` and `c = 1` (DOTS, arXiv 2506.05316, the replay loss as printed).

On policy `mu = pi_old` and both are GRPO (arXiv 2402.03300, equation 3).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from app.objective.forms import bounded_objective, capped_tokens, clipped_tokens
from app.objective.kl import kl_estimate
from app.objective.options import SurrogateOptions
from app.objective.ratios import LOG_RATIO_BOUND, bounded_exp, importance_weight, update_ratio
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
        weights: `[T]`, from `weights.token_weights`.
        options: which loss.
        old_logprobs: `[T]`, log pi_old; None while the policy has not been updated since, when it is `logprobs` itself.
        sequences: int `[T]`, which sequence a token belongs to; needed for `ratio_level` and `importance_level`
            "sequence". All tokens of a sequence must be in the same call.
        entropy: `[T]`, measured, and rewarded when `entropy_coef` is not 0.
        reference_logprobs: `[T]`, log ref; needed when `beta` is not 0.

    Raises:
        ValueError: a tensor that the options need is missing, or a shape other than `[T]`.
    """
    old = logprobs.detach() if old_logprobs is None else old_logprobs.detach()
    _check(options, logprobs, behaviour_logprobs, advantages, weights, old, sequences, entropy, reference_logprobs)
    ratios = _ratios(logprobs, old, behaviour_logprobs, sequences, options)
    reference = None if reference_logprobs is None else reference_logprobs.detach()
    kl = None if reference is None else kl_estimate(logprobs, reference, options.kl_estimator)
    per_token = -ratios.factor * bounded_objective(ratios.update, advantages, logprobs, options)
    per_token = _with_penalties(per_token, ratios, kl, entropy, options)
    return PolicyLoss((weights * per_token).sum(), _terms(ratios, advantages, kl, entropy, options))


@dataclass(frozen=True, slots=True, eq=False)
class _Ratios:
    """Between the three policies, `[T]` each.

    Attributes:
        update: `x`, with gradient.
        factor: `c`.
        importance: the importance weight as used, or `pi_old / mu` where none is used.
        log_update: `log(pi / pi_old)`.
        log_importance: `log(pi_old / mu)`.
    """

    update: Tensor
    factor: Tensor
    importance: Tensor
    log_update: Tensor
    log_importance: Tensor


def _ratios(
    logprobs: Tensor, old: Tensor, behaviour: Tensor, sequences: Tensor | None, options: SurrogateOptions
) -> _Ratios:
    log_importance = old - behaviour
    if options.clip_center == "old":
        center = old
        importance = factor = importance_weight(log_importance, sequences, options)
    else:
        center = behaviour
        importance, factor = bounded_exp(log_importance), torch.ones_like(old)
    update = update_ratio(logprobs - center, sequences, options)
    return _Ratios(update, factor, importance, logprobs.detach() - old, log_importance)


def _with_penalties(
    per_token: Tensor, ratios: _Ratios, kl: Tensor | None, entropy: Tensor | None, options: SurrogateOptions
) -> Tensor:
    """The loss per token with its KL and entropy terms."""
    if kl is not None and options.beta:
        per_token = per_token + options.beta * (ratios.factor * ratios.update * kl if options.kl_corrected else kl)
    if entropy is not None and options.entropy_coef:
        per_token = per_token - options.entropy_coef * entropy
    return per_token


def _terms(
    ratios: _Ratios, advantages: Tensor, kl: Tensor | None, entropy: Tensor | None, options: SurrogateOptions
) -> TokenTerms:
    """What is reported of the loss."""
    clipped_low, clipped_high = clipped_tokens(ratios.update, advantages, options)
    return TokenTerms(
        ratio=ratios.update.detach(),
        log_update=ratios.log_update.clamp(-LOG_RATIO_BOUND, LOG_RATIO_BOUND),
        importance=ratios.importance,
        logp_difference=ratios.log_importance.abs(),
        clipped_low=clipped_low,
        clipped_high=clipped_high,
        capped=capped_tokens(ratios.update, advantages, options),
        entropy=None if entropy is None else entropy.detach(),
        kl=None if kl is None else kl.detach(),
    )


def _check(options: SurrogateOptions, logprobs: Tensor, *others: Tensor | None) -> None:
    *_, sequences, entropy, reference_logprobs = others
    if options.beta and reference_logprobs is None:
        raise ValueError(f"beta={options.beta} needs reference_logprobs")
    if options.entropy_coef and entropy is None:
        raise ValueError(f"entropy_coef={options.entropy_coef} needs entropy")
    if options.needs_sequences and sequences is None:
        levels = f"ratio_level {options.ratio_level!r}, importance_level {options.importance_level!r}"
        raise ValueError(f"{levels}: 'sequence' needs the sequence index of every token")
    shapes = [tuple(other.shape) for other in (logprobs, *others) if other is not None]
    if logprobs.ndim != 1 or len(set(shapes)) != 1:
        raise ValueError(f"shapes {shapes}: expected all to be [T]")
