"""Statistics of the loss as sums and maxima, which are merged over micro-batches and ranks and then become metrics."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

_ALWAYS = ("tokens", "clipped_low", "clipped_high", "ratio", "approx_kl", "importance", "importance_squared")
SUMS = (*_ALWAYS, "logp_difference", "entropy", "entropy_tokens", "kl", "kl_tokens", "capped", "capped_tokens")
MAXIMA = ("ratio", "importance", "minus_importance", "logp_difference")


@dataclass(frozen=True, slots=True, eq=False)
class Statistics:
    """Sums and maxima over generated tokens. Reduce over ranks by summing `sums` and taking the maximum of `maxima`.

    Attributes:
        sums: float32 `[len(SUMS)]`, on the loss's device.
        maxima: float32 `[len(MAXIMA)]`; -inf where there was no token.
    """

    sums: Tensor
    maxima: Tensor

    @classmethod
    def empty(cls, device: torch.device | str = "cpu") -> Statistics:
        """Return the statistics of no token: `empty.merge(x)` equals `x`."""
        return cls(torch.zeros(len(SUMS), device=device), torch.full((len(MAXIMA),), -torch.inf, device=device))

    def merge(self, other: Statistics) -> Statistics:
        """Return the statistics of both sets of tokens."""
        return Statistics(self.sums + other.sums, torch.maximum(self.maxima, other.maxima))

    def metrics(self) -> dict[str, float]:
        """Return means and extremes over the tokens, under TRL's names for TRL's metrics. Empty without tokens.

        `policy/ratio_*` is the clipped ratio (`w`, or `rho` when the clip is centred on the behaviour policy),
        `policy/approx_kl` the k3 estimate of KL(pi_old || pi), `sampling/importance_sampling_ratio/*` the importance
        weight as used, and `sampling/effective_sample_fraction` its `(sum x)^2 / (T sum x^2)`, 1 on policy.
        `clip_ratio/*` is 0 for a form without a clip range; `clip_ratio/capped_mean` exists only for a form with a
        second bound (CISPO's cap, dual clip's).
        """
        sums = dict(zip(SUMS, self.sums.tolist(), strict=True))
        maxima = dict(zip(MAXIMA, self.maxima.tolist(), strict=True))
        tokens = sums["tokens"]
        if not tokens:
            return {}
        squared = tokens * sums["importance_squared"]
        metrics = {
            "clip_ratio/low_mean": sums["clipped_low"] / tokens,
            "clip_ratio/high_mean": sums["clipped_high"] / tokens,
            "clip_ratio/region_mean": (sums["clipped_low"] + sums["clipped_high"]) / tokens,
            "policy/ratio_mean": sums["ratio"] / tokens,
            "policy/ratio_max": maxima["ratio"],
            "policy/approx_kl": sums["approx_kl"] / tokens,
            "sampling/importance_sampling_ratio/min": -maxima["minus_importance"],
            "sampling/importance_sampling_ratio/mean": sums["importance"] / tokens,
            "sampling/importance_sampling_ratio/max": maxima["importance"],
            "sampling/effective_sample_fraction": sums["importance"] ** 2 / squared if squared else 0.0,
            "sampling/sampling_logp_difference/mean": sums["logp_difference"] / tokens,
            "sampling/sampling_logp_difference/max": maxima["logp_difference"],
        }
        for name, metric in (("entropy", "entropy"), ("kl", "kl"), ("capped", "clip_ratio/capped_mean")):
            if sums[f"{name}_tokens"]:
                metrics[metric] = sums[name] / sums[f"{name}_tokens"]
        return metrics


@dataclass(frozen=True, slots=True, eq=False)
class TokenTerms:
    """The parts of the loss, token by token; all `[T]`, without gradient.

    Attributes:
        ratio: the ratio that is clipped: `pi / pi_old`, or `pi / mu`.
        log_update: `log(pi / pi_old)`, bounded.
        importance: the importance weight as used (truncated or masked), or `pi_old / mu` if none is used.
        logp_difference: `|log pi_old - log mu|`, the distance between the policy and the sampler.
        clipped_low: bool: `ratio` below the clip range and the advantage negative, so that no gradient flows.
        clipped_high: bool: `ratio` above the clip range and the advantage positive.
        capped: bool: `ratio` beyond the form's second bound, if it has one (`surrogate.capped_tokens`).
        entropy: the policy's entropy at the token, if it was computed.
        kl: estimate of KL(pi || ref), if there is a reference.
    """

    ratio: Tensor
    log_update: Tensor
    importance: Tensor
    logp_difference: Tensor
    clipped_low: Tensor
    clipped_high: Tensor
    capped: Tensor | None = None
    entropy: Tensor | None = None
    kl: Tensor | None = None

    def statistics(self, where: Tensor | None = None) -> Statistics:
        """Return the statistics of all tokens, or of those that the bool mask `where` `[T]` selects."""

        def chosen(values: Tensor | None) -> Tensor:
            values = self.ratio.new_empty(0) if values is None else values if where is None else values[where]
            return values.float()

        ratio, importance, difference = chosen(self.ratio), chosen(self.importance), chosen(self.logp_difference)
        if not ratio.numel():
            return Statistics.empty(ratio.device)
        log_update = chosen(self.log_update)
        terms = [torch.ones_like(ratio), chosen(self.clipped_low), chosen(self.clipped_high), ratio]
        terms += [torch.expm1(log_update) - log_update, importance, importance.square(), difference]
        for sometimes in (chosen(self.entropy), chosen(self.kl), chosen(self.capped)):
            terms += [sometimes, torch.ones_like(sometimes)]
        maxima = [ratio.amax(), importance.amax(), -importance.amin(), difference.amax()]
        return Statistics(torch.stack([term.sum() for term in terms]), torch.stack(maxima))
