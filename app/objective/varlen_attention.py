"""Attention without padding, mask or copies of a prompt: for half precision, where kernels of variable length exist.

All tokens attend causally to their own run (a prompt or a completion), and those of completions also to their prompt's.
The two parts are joined by their log-sum-exps, as parts of one sequence are in ring attention (arXiv 2310.01889), and
with the joined output and log-sum-exp each part's backward pass is exact. Only queries, keys, values, output and
log-sum-exp are kept for it.

A file for private operators of torch: its public attention of variable length has no backward pass for another
log-sum-exp than its own, and no CPU's.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


@dataclass(frozen=True, slots=True, eq=False)
class Runs:
    """Consecutive runs of queries, and of the keys that each of them reads.

    Attributes:
        queries: int64 `[r]`: lengths of the runs of queries.
        keys: int64 `[r]`: lengths of the runs of keys.
        causal: a run reads itself, each query up to its own place.
        query_edges: int32 `[r + 1]`: where runs of queries begin, and the last one ends.
        key_edges: int32 `[r + 1]`.
    """

    queries: np.ndarray
    keys: np.ndarray
    causal: bool
    query_edges: Tensor
    key_edges: Tensor

    @classmethod
    def of(cls, queries: np.ndarray, keys: np.ndarray, causal: bool, device: torch.device | str) -> Runs:
        edges = (np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32) for lengths in (queries, keys))
        return cls(queries, keys, causal, *(torch.from_numpy(one).to(device) for one in edges))

    def __iter__(self) -> Iterator[tuple[slice, slice]]:
        """Yield the places of each run's queries, where it has any, and keys."""
        for length, stop, read, read_stop in zip(
            self.queries.tolist(), self.queries.cumsum().tolist(),
            self.keys.tolist(), self.keys.cumsum().tolist(), strict=True,
        ):  # fmt: skip
            if length:
                yield slice(stop - length, stop), slice(read_stop - read, read_stop)


def has_kernel(value: Tensor) -> bool:
    """Return whether there is attention of variable length for states of this dtype, device and head width."""
    if value.dtype.itemsize > 2 or value.device.type == "cpu":
        return value.dtype.itemsize == 2
    fits = value.is_cuda and value.shape[-1] % 8 == 0 and value.shape[-1] <= 256
    return fits and torch.cuda.get_device_capability(value.device) >= (8, 0)


def shared_attention(query: Tensor, key: Tensor, value: Tensor, own: Runs, read: Runs, scale: float) -> Tensor:
    """Return the attention output `[N, heads, width]`.

    Args:
        query: `[N, heads, width]`.
        key: `[N, key_value_heads, width]`.
        value: same shape as `key`.
        own: the runs of all `N` tokens, prompts first.
        read: the last tokens as queries, those of a prompt's completions in a run, and the first ones as the keys of
            their prompts.
        scale: factor of the dot products.
    """
    return _SharedAttention.apply(query, key, value, own, read, scale)


class _SharedAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, own: Runs, read: Runs, scale: float) -> Tensor:
        first = int(read.keys.sum())
        output, lse = _attention(query, key, value, own, scale)
        before, also = _attention(query[first:], key[:first], value[:first], read, scale)
        written = lse[:, first:]
        share = (also - written).sigmoid().T.unsqueeze(2)
        output[first:] = torch.lerp(output[first:].to(lse.dtype), before.to(lse.dtype), share)
        lse[:, first:] = torch.logaddexp(written, also)
        ctx.save_for_backward(query, key, value, output, lse)
        ctx.own, ctx.read, ctx.scale = own, read, scale
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, output, lse = ctx.saved_tensors
        first = int(ctx.read.keys.sum())
        grads = _gradients(grad, query, key, value, output, lse, ctx.own, ctx.scale)
        parts = grad[first:], query[first:], key[:first], value[:first], output[first:], lse[:, first:].contiguous()
        more = _gradients(*parts, ctx.read, ctx.scale)
        for one, other, rows in zip(grads, more, (slice(first, None), slice(first), slice(first)), strict=True):
            one[rows] += other
        return (*grads, None, None, None)


def _attention(query: Tensor, key: Tensor, value: Tensor, runs: Runs, scale: float) -> tuple[Tensor, Tensor]:
    """Return the output `[N, heads, width]` and the log-sum-exp `[heads, N]`."""
    if query.is_cuda:
        output, lse, *_ = torch.ops.aten._flash_attention_forward(
            query, key, value, runs.query_edges, runs.key_edges, int(runs.queries.max()), int(runs.keys.max()),
            0.0, runs.causal, False, scale=scale,
        )  # fmt: skip
        return output, lse
    output = query.new_empty(query.shape)
    lse = query.new_empty(query.shape[1::-1], dtype=torch.promote_types(query.dtype, torch.float32))
    for asked, read in runs:
        heads = (_by_head(states) for states in (query[asked], *_repeated(query, key[read], value[read])))
        found, sums = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(*heads, 0.0, runs.causal, scale=scale)
        output[asked], lse[:, asked] = found[0].transpose(0, 1), sums[0]
    return output, lse


def _gradients(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, output: Tensor, lse: Tensor, runs: Runs, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of query, key and value."""
    if query.is_cuda:
        state, unused = torch.zeros(2, dtype=torch.uint64, device=query.device), query.new_empty(0)  # of no dropout
        found: tuple[Tensor, Tensor, Tensor] = torch.ops.aten._flash_attention_backward(
            grad, query, key, value, output, lse, runs.query_edges, runs.key_edges, int(runs.queries.max()),
            int(runs.keys.max()), 0.0, runs.causal, state, unused, scale=scale,
        )  # fmt: skip
        return found
    grads = tuple(one.new_zeros(one.shape) for one in (query, key, value))
    for asked, read in runs:
        keys, values = _repeated(query, key[read], value[read])
        heads = (_by_head(states) for states in (grad[asked], query[asked], keys, values, output[asked]))
        found = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            *heads, lse[None, :, asked], 0.0, runs.causal, scale=scale
        )
        for one, part, rows in zip(grads, found, (asked, read, read), strict=True):
            one[rows] += part[0].transpose(0, 1).unflatten(1, (one.shape[1], -1)).sum(2)
    return grads[0], grads[1], grads[2]


def _by_head(states: Tensor) -> Tensor:
    """Return `[L, heads, width]` as the CPU's kernel takes it, `[1, heads, L, width]`."""
    return states.transpose(0, 1)[None]


def _repeated(query: Tensor, *states: Tensor) -> tuple[Tensor, ...]:
    """Repeat the heads of keys and values for the queries' heads that share one."""
    return tuple(one.repeat_interleave(query.shape[1] // one.shape[1], dim=1) for one in states)
