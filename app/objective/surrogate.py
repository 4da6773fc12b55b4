"""One policy loss for every variant of GRPO, on fresh, off-policy and replayed tokens.

    loss = sum_t weight_t * ( -c_t f(x_t, A_t) + beta KL_t - eta entropy_t )

`f` is the form (`bounded_objective`): the clipped objective, CISPO's or SAPO's. The ratio `x` is each token's own or
its sequence's geometric mean, and is relative to one of two policies:

- "old": `x = w = pi / pi_old` and `c = rho_old = pi_old / mu`, truncated or masked and without gradient. This is
  decoupled PPO (arXiv 2110.00641, equation 5) with truncated importance sampling; `c x` is `rho = pi / mu` clipped to
  `rho_old (1 - eps_low) .. rho_old (1 + eps_high)`, so the trust region is around the current policy while the weight
  stays relative to the behaviour policy. The code of DOTS's authors does this without a limit (`importance_cap: .inf`).
- "behaviour": `x = rho = pi / mu` and `c = 1` (DOTS, arXiv 2506.05316, the replay loss as printed).

On policy, `mu = pi_old` and both are GRPO (arXiv 2402.03300, equation 3).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from app.objective.ratios import (
    LOG_RATIO_BOUND,
    bounded_exp,
    check_choice,
    importance_weight,
    kl_estimate,
    update_ratio,
)
from app.objective.statistics import Statistics, TokenTerms
from datamodules.errors import UserError

_CHOICES = {
    "form": ("clip", "cispo", "sapo"),
    "ratio_level": ("token", "sequence"),
    "clip_center": ("old", "behaviour"),
    "importance_level": ("token", "sequence"),
    "importance_mode": ("truncate", "mask"),
    "kl_estimator": ("k1", "k2", "k3"),
}


@dataclass(frozen=True)
class SurrogateOptions:
    """Choice of the loss within the GRPO family (`configs/objective/` has the published ones).

    Args:
        form: how a ratio far from 1 is bounded: "clip" stops its gradient outside the clip range (PPO, GRPO, DAPO,
            GSPO), "cispo" keeps every token's gradient and bounds its weight, "sapo" fades it out smoothly.
        epsilon_low: the clip range starts at `1 - epsilon_low`. Only with `form: clip`.
        epsilon_high: the clip range ends at `1 + epsilon_high`. Only with `form: clip`.
        dual_clip: at negative advantages, stop the gradient of larger ratios too; above `1 + epsilon_high`, usually 3;
            null turns it off. Only with `form: clip`.
        cispo_cap: largest weight of a token's gradient. Only with `form: cispo`.
        sapo_tau_positive: how fast the gradient fades at positive advantages. Only with `form: sapo`.
        sapo_tau_negative: how fast it fades at the other advantages. Only with `form: sapo`.
        ratio_level: "token", or "sequence": the geometric mean over the completion (GSPO), which needs a far narrower
            clip range. The importance weights of tokens then count by their mean over the completion.
        clip_center: policy that the ratio is relative to: "old" (before this update) or "behaviour" (the sampler).
        importance_cap: largest importance weight `pi_old / mu`; `.inf` for none. Only with `clip_center: old`.
        importance_level: "token", or "sequence": the product over the completion, which is unbiased and has the
            highest variance. Only with `clip_center: old`.
        importance_mode: what happens to a weight above the cap: "truncate" lowers it to the cap (TIS), "mask" sets it
            to 0 (MIS). Only with `clip_center: old`.
        beta: factor of the KL to the reference policy; 0 needs no reference.
        kl_estimator: "k1", "k2" or "k3". Without `kl_corrected` only k2 has the gradient of KL(pi || ref); k1's is 0
            on average.
        kl_corrected: multiply the KL estimate by the ratio and the importance weight, which gives k1 and k3 the
            gradient of KL(pi || ref), on replayed tokens too.
        entropy_coef: factor of the entropy bonus.
    """

    form: Literal["clip", "cispo", "sapo"] = "clip"
    epsilon_low: float = 0.2
    epsilon_high: float = 0.2
    dual_clip: float | None = None
    cispo_cap: float = 5.0
    sapo_tau_positive: float = 1.0
    sapo_tau_negative: float = 1.05
    ratio_level: Literal["token", "sequence"] = "token"
    clip_center: Literal["old", "behaviour"] = "old"
    importance_cap: float = 2.0
    importance_level: Literal["token", "sequence"] = "token"
    importance_mode: Literal["truncate", "mask"] = "truncate"
    beta: float = 0.0
    kl_estimator: Literal["k1", "k2", "k3"] = "k3"
    kl_corrected: bool = False
    entropy_coef: float = 0.0

    def __post_init__(self) -> None:
        for name, valid in _CHOICES.items():
            check_choice(f"surrogate.{name}", getattr(self, name), valid)
        dual_clip_fits = self.dual_clip is None or 1 + self.epsilon_high < self.dual_clip < math.inf
        for name, fits, expected in [
            ("epsilon_low", 0 <= self.epsilon_low <= 1, "a number in [0, 1]"),
            ("epsilon_high", self.epsilon_high >= 0, "0 or more"),
            ("dual_clip", dual_clip_fits, "null or a number above 1 + epsilon_high"),
            ("cispo_cap", self.cispo_cap > 0, "a number above 0"),
            ("sapo_tau_positive", 0 < self.sapo_tau_positive < math.inf, "a number above 0"),
            ("sapo_tau_negative", 0 < self.sapo_tau_negative < math.inf, "a number above 0"),
            ("importance_cap", self.importance_cap > 0, "a number above 0"),
            ("beta", 0 <= self.beta < math.inf, "0 (no reference) or more"),
            ("entropy_coef", math.isfinite(self.entropy_coef), "a number; 0 is off"),
        ]:
            if not fits:
                raise UserError(f"surrogate.{name} is {getattr(self, name)}; set it to {expected}.")
        if self.dual_clip is not None and self.form != "clip":
            raise UserError(
                f"surrogate.dual_clip is {self.dual_clip} with form={self.form!r}, but only form 'clip' has a clip "
                "range. Set dual_clip to null or form to clip."
            )
        if self.clip_center == "behaviour" and (self.importance_level, self.importance_mode) != ("token", "truncate"):
            raise UserError(
                f"surrogate.clip_center is 'behaviour' with importance_level={self.importance_level!r} and "
                f"importance_mode={self.importance_mode!r}, but a ratio to the behaviour policy has no importance "
                "weight. Leave both at their defaults or set clip_center to old."
            )
        if self.kl_corrected and not self.beta:
            raise UserError("surrogate.kl_corrected is true with beta=0: no KL term to correct. Set beta above 0.")


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
        sequences: int `[T]`, the sequence of each token; required by `ratio_level` and `importance_level` "sequence".
            All tokens of a sequence must be in the same call.
        entropy: `[T]`, measured, and rewarded when `entropy_coef` is not 0.
        reference_logprobs: `[T]`, log ref; required when `beta` is not 0.

    Raises:
        ValueError: a tensor that the options need is missing, or a shape is not `[T]`.
    """
    old = logprobs.detach() if old_logprobs is None else old_logprobs.detach()
    if options.beta and reference_logprobs is None:
        raise ValueError(f"beta={options.beta} needs reference_logprobs, which is None. Pass it or set beta to 0.")
    if options.entropy_coef and entropy is None:
        raise ValueError(f"entropy_coef={options.entropy_coef} needs entropy, which is None. Pass it or set it to 0.")
    if "sequence" in (options.ratio_level, options.importance_level) and sequences is None:
        levels = f"ratio_level {options.ratio_level!r} and importance_level {options.importance_level!r}"
        raise ValueError(f"The loss with {levels} needs the sequence index of every token. Pass sequences.")
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
    per_token = -factor * bounded_objective(ratio, advantages, logprobs, options)
    if kl is not None and options.beta:
        per_token = per_token + options.beta * (factor * ratio * kl if options.kl_corrected else kl)
    if entropy is not None and options.entropy_coef:
        per_token = per_token - options.entropy_coef * entropy

    clipped_low, clipped_high = clipped_tokens(ratio, advantages, options)
    terms = TokenTerms(
        ratio=ratio.detach(),
        log_update=(logprobs.detach() - old).clamp(-LOG_RATIO_BOUND, LOG_RATIO_BOUND),
        importance=importance,
        logp_difference=log_importance.abs(),
        clipped_low=clipped_low,
        clipped_high=clipped_high,
        capped=capped_tokens(ratio, advantages, options),
        entropy=None if entropy is None else entropy.detach(),
        kl=None if kl is None else kl.detach(),
    )
    return PolicyLoss((weights * per_token).sum(), terms)


def bounded_objective(ratio: Tensor, advantages: Tensor, logprobs: Tensor, options: SurrogateOptions) -> Tensor:
    """Return the objective to maximise at each token, before importance weights.

    All forms have the gradient `A grad log pi` at ratio 1; they differ away from there.

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
            low, high = 1 - options.epsilon_low, 1 + options.epsilon_high
            objective = torch.minimum(ratio * advantages, ratio.clamp(low, high) * advantages)
            if options.dual_clip is None:
                return objective
            return torch.where(advantages < 0, torch.maximum(objective, options.dual_clip * advantages), objective)
        case "cispo":
            return ratio.detach().clamp(max=options.cispo_cap) * advantages * logprobs
        case _:
            tau = torch.where(advantages > 0, options.sapo_tau_positive, options.sapo_tau_negative)
            return torch.sigmoid(tau * (ratio - 1)) * (4 / tau) * advantages


def clipped_tokens(ratio: Tensor, advantages: Tensor, options: SurrogateOptions) -> tuple[Tensor, Tensor]:
    """Return masks, bool `[T]`, of tokens below and above the clip range (if any) whose gradient it stops."""
    if options.form != "clip":
        none = torch.zeros_like(ratio, dtype=torch.bool)
        return none, none
    low, high = 1 - options.epsilon_low, 1 + options.epsilon_high
    return (ratio < low) & (advantages < 0), (ratio > high) & (advantages > 0)


def capped_tokens(ratio: Tensor, advantages: Tensor, options: SurrogateOptions) -> Tensor | None:
    """Return the mask, bool `[T]`, of tokens beyond CISPO's cap, or dual clip's at negative advantages; or None."""
    if options.form == "cispo":
        return ratio > options.cispo_cap
    return None if options.dual_clip is None else (ratio > options.dual_clip) & (advantages < 0)
