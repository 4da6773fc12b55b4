"""The per-token parts of the loss: ratios between policies, KL estimates, and the weight of each token."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from datamodules.errors import UserError, nearest

LOG_RATIO_BOUND = 20.0
"""Log-ratios are clamped to +-20 before `exp`: a larger ratio is meaningless, and it gets no gradient."""

Aggregation = Literal["token", "sequence", "constant", "sequence_sum", "token_sum"]
AGGREGATIONS = ("token", "sequence", "constant", "sequence_sum", "token_sum")


def check_choice(name: str, given: str, valid: tuple[str, ...]) -> None:
    """Raise UserError if the option `name` has a value that is not among the valid ones."""
    if given not in valid:
        raise UserError(f"{name} is {given!r}; expected one of {', '.join(valid)}: {nearest(str(given), valid)}")


def bounded_exp(log_ratio: Tensor) -> Tensor:
    """Return `exp` of log-ratios of any shape, clamped to `LOG_RATIO_BOUND`."""
    return log_ratio.clamp(-LOG_RATIO_BOUND, LOG_RATIO_BOUND).exp()


def update_ratio(log_ratio: Tensor, sequences: Tensor | None) -> Tensor:
    """Return the ratio that the surrogate bounds, `[T]`.

    Args:
        log_ratio: `[T]`.
        sequences: int `[T]`, the sequence of each token, to use the geometric mean over it: GSPO's
            `(pi(o) / pi_old(o))^(1 / |o|)` (arXiv 2507.18071, equation 7). None uses each token's own ratio.
    """
    if sequences is not None:
        log_ratio = sequence_mean(log_ratio, sequences)
    return bounded_exp(log_ratio)


def importance_weight(
    log_importance: Tensor, sequences: Tensor | None, cap: float, mode: Literal["truncate", "mask"]
) -> Tensor:
    """Return the importance weight `pi_old / mu`, `[T]`, limited by a cap.

    Args:
        log_importance: `[T]`, `log(pi_old / mu)` of each token.
        sequences: int `[T]`, the sequence of each token, to use the product over it; None uses each token's own weight.
        cap: the largest weight.
        mode: "truncate" lowers a larger weight to the cap (TIS), "mask" sets it to 0 (MIS).
    """
    if sequences is not None:
        log_importance = sequence_sum(log_importance, sequences)
    importance = bounded_exp(log_importance)
    return torch.where(importance <= cap, importance, 0.0) if mode == "mask" else importance.clamp(max=cap)


def sequence_sum(values: Tensor, sequences: Tensor) -> Tensor:
    """Return the sum over each token's sequence, `[T]`."""
    # A target with one row per token is long enough, and finding the largest index would wait for the device.
    return torch.zeros_like(values).index_add(0, sequences, values)[sequences]


def sequence_mean(values: Tensor, sequences: Tensor) -> Tensor:
    """Return the mean over each token's sequence, `[T]`."""
    return sequence_sum(values, sequences) / sequence_sum(torch.ones_like(values), sequences)


def kl_estimate(logprobs: Tensor, reference_logprobs: Tensor, estimator: Literal["k1", "k2", "k3"]) -> Tensor:
    """Estimate KL(pi || ref) at each sampled token, `[T]`.

    With `x = log(ref / pi)`, k1 is `-x`, k2 `x^2 / 2` and k3 `e^x - 1 - x`. As a *value*, k1 and k3 are unbiased under
    samples from pi (http://joschu.net/blog/kl-approx.html). As a *loss* their expected gradients differ: k2's is that
    of KL(pi || ref), k3's that of KL(ref || pi), and k1's is 0. Multiplied by the ratio
    (`SurrogateOptions.kl_corrected`), both k1 and k3 have the gradient of KL(pi || ref) (DeepSeek-V3.2,
    arXiv 2512.02556, section 3.1). `x` is limited to +-20; verl, and with it DOTS' code, also clamps k3 to [-10, 10].
    """
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
    shares: Tensor | None = None,
) -> Tensor:
    """Return the weight of each sequence's tokens, such that the loss is a plain sum over tokens.

    Averages over sequences and tokens are those of whole groups of one size. Where sizes differ, a sequence counts by
    the inverse of its group's size (`shares`), so that every prompt counts alike: the loss is the mean over prompts of
    what its completions average to.

    Args:
        lengths: int `[N]`, generated tokens of each sequence of the global mini-batch: over all micro-batches and
            ranks, including sequences that get no forward pass because their advantage is 0.
        aggregation: "token": mean over all tokens (DAPO, arXiv 2503.14476, equation 8; TRL calls it BNPO when the
            local batch is the mini-batch; DOTS' code adds up such means of each of its micro-batches); "sequence": mean
            over a sequence's tokens, then over sequences (GRPO); "constant": sum over tokens divided by
            `max_completion_length` x sequences (Dr. GRPO, arXiv 2503.20783); "sequence_sum": sum over a sequence's
            tokens, then mean over sequences (verl's seq-mean-token-sum, and with a sequence ratio LUSPO,
            arXiv 2602.05261); "token_sum": sum over all tokens.
        max_completion_length: required by "constant".
        shares: `[N]`, mean size of the batch's groups divided by the size of the sequence's own group; None for 1.

    Returns:
        Float32 `[N]` (float64 for float64 lengths); all tokens of a sequence have the same weight.

    Raises:
        UserError: an unknown aggregation.
        ValueError: "constant" without `max_completion_length`.
    """
    check_choice("aggregation", aggregation, AGGREGATIONS)
    lengths = lengths.to(torch.promote_types(lengths.dtype, torch.float32))
    shares = torch.ones_like(lengths) if shares is None else shares.to(lengths.dtype)
    sequences = float(shares.sum()) or 1.0
    if aggregation == "token":
        return shares / (float((shares * lengths).sum()) or 1.0)
    if aggregation == "sequence":
        return shares / (lengths.clamp(min=1) * sequences)
    if aggregation in ("sequence_sum", "token_sum"):
        return shares / (sequences if aggregation == "sequence_sum" else 1.0)
    if max_completion_length is None:
        raise ValueError("aggregation 'constant' needs max_completion_length, which is None. Pass it.")
    return shares / (max_completion_length * sequences)
