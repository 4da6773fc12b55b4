"""What every completion token counts in the loss, so that the loss is a plain sum."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from datamodules.errors import UserError, nearest

Aggregation = Literal["token", "sequence", "constant"]
AGGREGATIONS = ("token", "sequence", "constant")


def token_weights(
    lengths: Tensor,
    aggregation: Aggregation = "token",
    *,
    max_completion_length: int | None = None,
    total_tokens: float | None = None,
    total_sequences: float | None = None,
) -> Tensor:
    """The weight of each token of each sequence.

    The totals are those of the whole global mini-batch: over all micro-batches and ranks, and with the sequences whose
    forward pass is left out because their advantage is 0. Where gradients are then averaged over ranks, multiply the
    weights by the number of ranks.

    Args:
        lengths: int `[N]`: completion tokens of each sequence.
        aggregation: "token": mean over all tokens (DAPO, arXiv 2503.14476, equation 8; what TRL calls BNPO, where the
            local batch is the mini-batch); "sequence": mean over a sequence's tokens, then over sequences (GRPO);
            "constant": sum over tokens divided by `max_completion_length` x sequences (Dr. GRPO, arXiv 2503.20783).
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
