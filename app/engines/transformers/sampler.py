"""Samples one token per row by inverting the cumulative distribution at a number derived from (seed, position).

There is no generator with a state, so a draw cannot depend on earlier draws or on other rows of the batch.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F

from app.engines.base import Sampling

BLOCK = 256
"""Tokens per block. Cumulative sums run over blocks and then inside one block, so no `[N, V]` tensor is float64."""

NUCLEUS_CANDIDATES = 1024
"""Most probable tokens that top-p examines before it sorts a row's whole vocabulary."""

SORT_ROWS = 16
"""Rows whose whole vocabulary is sorted at once, which bounds the float64 memory of flat distributions."""

GOLDEN_GAMMA = 0x9E3779B97F4A7C15


def uniforms(seeds: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """Return one number in [0, 1) per (seed, position), by a counter-based SplitMix64 (Steele, Lea and Flood 2014).

    Args:
        seeds: int64 `[N]`.
        positions: int64 `[N]`: number of tokens already drawn for the completion.

    Returns:
        float64 `[N]` with 53 random bits.
    """
    with np.errstate(over="ignore"):  # arithmetic modulo 2**64 is intended
        counters = (np.asarray(positions).astype(np.uint64) + np.uint64(1)) * np.uint64(GOLDEN_GAMMA)
        bits = _mix(_mix(np.asarray(seeds).astype(np.uint64)) + counters)
    return (bits >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _mix(bits: np.ndarray) -> np.ndarray:
    """Apply SplitMix64's finaliser (Stafford's variant 13), a bijection of 64-bit words."""
    bits = (bits ^ (bits >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    bits = (bits ^ (bits >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return bits ^ (bits >> np.uint64(31))


def draw(logits: torch.Tensor, uniform: torch.Tensor, sampling: Sampling) -> tuple[torch.Tensor, torch.Tensor]:
    """Sample one token per row and return it with its log-probability under the distribution it was sampled from.

    The order of operations is temperature, top-k, then top-p over what top-k kept. Both keep all tokens tied with the
    last kept one, so the kept set does not depend on how a sort breaks ties.

    Args:
        logits: `[N, V]` of any float type; left unchanged.
        uniform: float64 `[N]` in [0, 1).
        sampling: temperature, top_k and top_p.

    Returns:
        tokens int64 `[N]` and log-probabilities float32 `[N]`: 0 for greedy draws, NaN for rows with NaN logits.
    """
    logits = logits.float()
    peak, best = logits.max(dim=-1, keepdim=True)
    if sampling.temperature == 0:
        return best.squeeze(-1), torch.where(peak.squeeze(-1).isfinite(), 0.0, torch.nan)
    weights = (logits - peak).mul_(1 / sampling.temperature).exp_()
    if 0 < sampling.top_k < logits.shape[-1]:
        smallest_kept = torch.topk(logits, sampling.top_k, dim=-1, sorted=False).values.min(dim=-1, keepdim=True).values
        weights.masked_fill_(logits < smallest_kept, 0)
    if sampling.top_p < 1:
        weights.masked_fill_(weights < _nucleus_floor(weights, sampling.top_p), 0)
    token, total = _invert(weights, uniform)
    chosen = logits.gather(1, token[:, None]).sub_(peak).double().squeeze(1) / sampling.temperature
    return token, (chosen - total.log()).float()


def _nucleus_floor(weights: torch.Tensor, top_p: float) -> torch.Tensor:
    """Return `[N, 1]`: the smallest weight in the smallest set of tokens whose share of the total reaches `top_p`."""
    goal = _block_sums(weights).sum(dim=-1, keepdim=True) * top_p
    candidates = torch.topk(weights, min(NUCLEUS_CANDIDATES, weights.shape[-1]), dim=-1).values
    floor, reached = _floor_of_sorted(candidates, goal)
    for rows in (~reached).nonzero().squeeze(1).split(SORT_ROWS):
        floor[rows] = _floor_of_sorted(weights[rows].sort(dim=-1, descending=True).values, goal[rows])[0]
    return floor


def _floor_of_sorted(ordered: torch.Tensor, goal: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the weight at which descending `[N, K]` weights first sum to `goal` `[N, 1]`, and if they do so `[N]`."""
    position = torch.searchsorted(ordered.cumsum(dim=-1, dtype=torch.float64), goal)
    reached = position.squeeze(1) < ordered.shape[-1]
    return ordered.gather(1, position.clamp_(max=ordered.shape[-1] - 1)), reached


def _block_sums(weights: torch.Tensor) -> torch.Tensor:
    """Return float64 `[N, ceil(V / BLOCK)]`; float32 sums of short blocks are as exact as float32 probabilities."""
    whole = weights.shape[-1] // BLOCK * BLOCK
    sums = weights[:, :whole].unflatten(1, (-1, BLOCK)).sum(dim=-1) if whole else weights[:, :0]
    if whole < weights.shape[-1]:
        sums = torch.cat([sums, weights[:, whole:].sum(dim=-1, keepdim=True)], dim=1)
    return sums.double()


def _invert(weights: torch.Tensor, uniform: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the first token (int64 `[N]`) whose cumulative weight exceeds `uniform` of the total, and the totals."""
    vocabulary = weights.shape[-1]
    sums = _block_sums(weights)
    edges = F.pad(sums.cumsum(dim=-1), (1, 0))
    total = edges[:, -1]
    target = (uniform * total)[:, None]
    # The clamps only affect NaN rows, which must come out as NaN instead of failing inside an index kernel.
    block = torch.searchsorted(edges[:, 1:].contiguous(), target, right=True).clamp_(max=sums.shape[-1] - 1)
    columns = block * BLOCK + torch.arange(BLOCK, device=weights.device)
    inside = weights.gather(1, columns.clamp(max=vocabulary - 1)).double().masked_fill_(columns >= vocabulary, 0)
    inside = inside.cumsum(dim=-1)
    # Rounding between the two levels could push the remainder past the block's end, where no token has any weight.
    rest = torch.minimum(target - edges.gather(1, block), inside[:, -1:] * (1 - 2.0**-52))
    offset = torch.searchsorted(inside, rest.clamp_(min=0), right=True)
    return (block * BLOCK + offset).clamp_(max=vocabulary - 1).squeeze(1), total
