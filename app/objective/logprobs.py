"""Log-probability and entropy of given tokens from hidden states, without ever holding a tokens x vocabulary tensor.

The head's logits are computed in tiles of some tokens x some of the vocabulary. The forward pass keeps three numbers
per token and tile, which combine into the log-sum-exp and the entropy (online softmax, arXiv 1805.02867); the backward
pass recomputes every tile and turns it into its gradient in place. Sums are in float32 (float64 for float64 inputs)
for inputs of any type; logits are never rounded to half precision in between. What matrix products read may be
(`HeadPrecision`).

With logits `z` (after scale, soft cap and temperature), `p = softmax(z)`, `S = logsumexp(z)`, `M = sum_j p_j z_j`:

    log p_y = z_y - S              d(log p_y) / dz_j = [j = y] - p_j
    entropy = S - M                d(entropy) / dz_j = -p_j (z_j - M)
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from app.objective.sketches import TokenSketch

CPU_TILE_BYTES = 4 * 2**20
DEVICE_TILE_BYTES = 64 * 2**20
"""Size of one buffer of logits; up to three are alive at once. A CPU's fits its cache, a device's keeps it busy."""

HeadPrecision = Literal["float32", "tf32", "bfloat16"]
"""How the head's matrix products read float32 numbers; all sums are in float32.

"bfloat16" rounds to 8 significant bits, "tf32" to 11 on GPUs of compute capability 8.0 or more. Elsewhere "tf32" is
"float32", which leaves numbers as they are unless the process has set `torch.set_float32_matmul_precision`.
"""


def token_logprobs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None = None,
    *,
    temperature: float = 1.0,
    softcap: float | None = None,
    scale: float = 1.0,
    with_entropy: bool = True,
    precision: HeadPrecision = "float32",
    tile_bytes: int | None = None,
    sketch: TokenSketch | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Return the log-probability of each target, and the entropy of its distribution.

    Both are once differentiable in `hidden`, `weight` and `bias`; one that the loss does not use has no backward pass.

    Args:
        hidden: `[T, H]`, the last hidden states at the positions that predict the targets.
        weight: `[V, H]`, the output embedding; with LoRA the sum of base weight and update.
        targets: int `[T]`, each in `0 .. V - 1`.
        bias: `[V]`.
        temperature: divides the logits, last; above 0. It must be the temperature that the tokens were sampled with.
        softcap: logits become `softcap * tanh(logits / softcap)` (Gemma 2, arXiv 2408.00118, section 2).
        scale: multiplies the logits, first (Cohere's `logit_scale`, the inverse of Granite's `logits_scaling`).
        precision: of the matrix products, forward and backward.
        tile_bytes: size of one buffer of logits; by default 4 MiB on a CPU and 64 MiB on other devices.
        sketch: to which the backward pass adds the tokens' gradients with respect to `weight`, also where these are not
            asked for.

    Returns:
        `logprobs [T]` and `entropy [T]` (None without `with_entropy`), in nats, float32 (float64 for float64 inputs).

    Raises:
        ValueError: shapes that do not match, a temperature of 0 or less, or a target outside the vocabulary. Targets
            are checked on the CPU only; on another device a check would synchronise, and the result is NaN.
    """
    if hidden.ndim != 2 or weight.ndim != 2 or hidden.shape[1] != weight.shape[1] or targets.shape != hidden.shape[:1]:
        shapes = f"hidden {tuple(hidden.shape)}, weight {tuple(weight.shape)}, targets {tuple(targets.shape)}"
        raise ValueError(f"{shapes}: expected [T, H], [V, H] and [T]")
    if temperature <= 0:
        raise ValueError(f"temperature={temperature}: expected above 0 (a greedy policy has no log-probabilities)")
    if targets.device.type == "cpu" and targets.numel():
        least, most = int(targets.min()), int(targets.max())
        if least < 0 or most >= len(weight):
            raise ValueError(f"targets from {least} to {most}: expected 0 .. {len(weight) - 1}")
    if tile_bytes is None:
        tile_bytes = CPU_TILE_BYTES if hidden.device.type == "cpu" else DEVICE_TILE_BYTES
    logits = _Logits(scale=scale, softcap=softcap, temperature=temperature)
    logprobs, entropy = _TokenLogprobs.apply(
        hidden, weight, bias, targets, logits, with_entropy, precision, tile_bytes, sketch
    )
    return logprobs, entropy


@dataclass(frozen=True, slots=True)
class _Logits:
    """The transform from `hidden @ weight.T + bias` to the input of the softmax."""

    scale: float
    softcap: float | None
    temperature: float

    def tile(self, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Return the logits `[t, v]` of a tile, in one buffer."""
        z = _product(hidden, weight.T, bias)
        if self.softcap is None:
            factor = self.scale / self.temperature
            return z if factor == 1 else z.mul_(factor)
        return z.mul_(self.scale / self.softcap).tanh_().mul_(self.softcap / self.temperature)

    def chain_(self, grad: Tensor, z: Tensor) -> Tensor:
        """Turn the gradient of the logits into that of `hidden @ weight.T + bias`, in place; overwrites `z`."""
        if self.softcap is not None:
            grad.mul_(z.mul_(self.temperature / self.softcap).square_().neg_().add_(1))
        factor = self.scale / self.temperature
        return grad if factor == 1 else grad.mul_(factor)


class _TokenLogprobs(torch.autograd.Function):
    """Forward and backward of `token_logprobs`. Autocast would round the logits to half precision."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        logits: _Logits,
        with_entropy: bool,
        precision: HeadPrecision,
        tile_bytes: int,
        sketch: TokenSketch | None,
    ) -> tuple[Tensor, Tensor | None]:
        dtype = torch.promote_types(torch.promote_types(torch.float32, hidden.dtype), weight.dtype)
        target, lse = (torch.full(targets.shape, torch.nan, dtype=dtype, device=hidden.device) for _ in range(2))
        mean = torch.empty_like(lse) if with_entropy else None
        token_tile, vocab_tile = _tile_shape(len(hidden), len(weight), dtype.itemsize, tile_bytes)
        read = _read_as(dtype, precision)
        with _products(hidden.device, precision):
            for rows in _slices(len(hidden), token_tile):
                tokens = hidden[rows].to(read)
                parts: list[tuple[Tensor, Tensor, Tensor]] = []
                for columns in _slices(len(weight), vocab_tile):
                    head_bias = None if bias is None else bias[columns].to(dtype)
                    z = logits.tile(tokens, weight[columns].to(read), head_bias)
                    inside, place = _place(targets[rows], columns)
                    target[rows] = torch.where(inside, z.gather(1, place).squeeze(1), target[rows])
                    parts.append(_summary_(z, with_entropy))
                lse[rows], mean_logit = _combine(parts)
                if mean is not None:
                    mean[rows] = mean_logit
        ctx.save_for_backward(hidden, weight, bias, targets, lse, mean)
        ctx.logits, ctx.precision, ctx.tile_bytes, ctx.sketch = logits, precision, tile_bytes, sketch
        ctx.set_materialize_grads(False)
        return target - lse, None if mean is None else lse - mean

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_logprobs: Tensor | None, grad_entropy: Tensor | None) -> tuple[Tensor | None, ...]:
        if grad_logprobs is None and grad_entropy is None:
            return (None,) * 9
        with _products(ctx.saved_tensors[0].device, ctx.precision):
            grads = _backward(ctx, grad_logprobs, grad_entropy)
        return (*grads, None, None, None, None, None, None)


@contextmanager
def _products(device: torch.device, precision: HeadPrecision) -> Iterator[None]:
    """Multiply as `precision` says, and without autocast, which would round the results.

    TF32 is a setting of the process, and is put back: its other products are not the head's concern.
    """
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    if precision == "tf32":
        matmul.fp32_precision = "tf32"
    try:
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        if precision == "tf32":
            matmul.fp32_precision = before


def _read_as(dtype: torch.dtype, precision: HeadPrecision) -> torch.dtype:
    """Return the type that products with sums in `dtype` read."""
    return torch.bfloat16 if precision == "bfloat16" and dtype == torch.float32 else dtype


def _product(left: Tensor, right: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return `left @ right + bias`; the product of bfloat16 matrices in float32."""
    if left.dtype != torch.bfloat16:
        return left @ right if bias is None else torch.addmm(bias, left, right)
    # A CPU has no such product. Those of two bfloat16 numbers are exact in float32, so that the values are the same.
    z = torch.mm(left, right, out_dtype=torch.float32) if left.is_cuda else left.float() @ right.float()
    return z if bias is None else z.add_(bias)


def _add_product_(total: Tensor, left: Tensor, right: Tensor) -> None:
    if right.dtype == total.dtype:
        total.addmm_(left, right)
    else:
        total.add_(_product(left, right))


def _summary_(z: Tensor, with_entropy: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Return `m = max z`, `s = sum e^(z - m)`, `u = sum e^(z - m) (z - m)` of a tile, `[t]` each. Overwrites `z`."""
    top = z.amax(1)
    z.sub_(top.unsqueeze(1))
    if not with_entropy:
        total = z.exp_().sum(1)
        return top, total, torch.zeros_like(total)
    exponentials = z.exp()
    return top, exponentials.sum(1), exponentials.mul_(z).sum(1)


def _combine(parts: list[tuple[Tensor, Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Return the log-sum-exp and the mean logit `[t]` of a row of tiles."""
    tops, totals, moments = (torch.stack(part) for part in zip(*parts, strict=True))
    top = tops.amax(0)
    shift = tops - top
    rescale = shift.exp()
    total = (totals * rescale).sum(0)
    moment = ((moments + shift * totals) * rescale).sum(0)
    return top + total.log(), top + moment / total


def _backward(
    ctx: Any, grad_logprobs: Tensor | None, grad_entropy: Tensor | None
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Return the gradients of hidden states, weight and bias.

    The vocabulary is the outer loop, so that only one tile's weight gradient is held in the wide type.
    """
    hidden, weight, bias, targets, lse, mean = ctx.saved_tensors
    logits, needed, dtype, sketch = ctx.logits, ctx.needs_input_grad, lse.dtype, ctx.sketch
    read = _read_as(dtype, ctx.precision)
    tokens = hidden.to(read)
    grad_hidden = torch.zeros_like(tokens, dtype=dtype) if needed[0] else None
    grad_weight = torch.empty_like(weight) if needed[1] else None
    grad_bias = torch.empty_like(bias) if bias is not None and needed[2] else None
    sketched = (
        None if sketch is None else tokens.new_zeros(len(tokens), sketch.projection.vocabulary.shape[1]).to(dtype)
    )
    token_tile, vocab_tile = _tile_shape(len(hidden), len(weight), dtype.itemsize, ctx.tile_bytes)
    for columns in _slices(len(weight), vocab_tile):
        head = weight[columns].to(read)
        signs = None if sketch is None else sketch.projection.vocabulary[columns].to(read)
        head_bias = None if bias is None else bias[columns].to(dtype)
        weight_sum = torch.zeros_like(head, dtype=dtype) if needed[1] else None
        bias_sum = torch.zeros_like(head[:, 0], dtype=dtype) if needed[2] else None
        for rows in _slices(len(hidden), token_tile):
            z = logits.tile(tokens[rows], head, head_bias)
            keep = logits.softcap is not None or grad_entropy is not None
            parts = (None if one is None else one[rows] for one in (mean, grad_logprobs, grad_entropy))
            grad = logits.chain_(_tile_gradient(z, targets[rows], columns, keep, lse[rows], *parts), z)
            rounded = grad.to(read)
            if grad_hidden is not None:
                _add_product_(grad_hidden[rows], rounded, head)
            if weight_sum is not None:
                _add_product_(weight_sum, rounded.T, tokens[rows])
            if bias_sum is not None:
                bias_sum.add_(grad.sum(0))
            if sketched is not None and signs is not None:
                _add_product_(sketched[rows], rounded, signs)
        if grad_weight is not None and weight_sum is not None:
            grad_weight[columns] = weight_sum
        if grad_bias is not None and bias_sum is not None:
            grad_bias[columns] = bias_sum
    if sketch is not None and sketched is not None:
        sketch.add(sketched, _product(tokens, sketch.projection.hidden.to(read)))
    return None if grad_hidden is None else grad_hidden.to(hidden.dtype), grad_weight, grad_bias


def _tile_gradient(
    z: Tensor,
    targets: Tensor,
    columns: slice,
    keep: bool,
    lse: Tensor,
    mean: Tensor | None,
    grad_logprobs: Tensor | None,
    grad_entropy: Tensor | None,
) -> Tensor:
    """Return the gradient of the tile's logits `[t, v]`, written over `z` unless `keep`.

    It is `g [j = y] - p_j (g + h (z_j - M))`, with the gradients g of the log-probability and h of the entropy.
    """
    grad = (z.clone() if keep else z).sub_(lse.unsqueeze(1)).exp_()
    if grad_entropy is not None and mean is not None:
        inner = (z - mean.unsqueeze(1)).mul_(grad_entropy.unsqueeze(1))
        if grad_logprobs is not None:
            inner.add_(grad_logprobs.unsqueeze(1))
        grad.mul_(inner.neg_())
    elif grad_logprobs is not None:
        grad.mul_(-grad_logprobs.unsqueeze(1))
    if grad_logprobs is not None:
        inside, place = _place(targets, columns)
        grad.scatter_add_(1, place, torch.where(inside, grad_logprobs, 0).unsqueeze(1))
    return grad


def _place(targets: Tensor, columns: slice) -> tuple[Tensor, Tensor]:
    """Return a mask of the targets in the tile `[t]`, and their columns there (0 for the others) `[t, 1]`."""
    inside = (targets >= columns.start) & (targets < columns.stop)
    return inside, torch.where(inside, targets - columns.start, 0).unsqueeze(1)


def _tile_shape(tokens: int, vocabulary: int, itemsize: int, tile_bytes: int) -> tuple[int, int]:
    """Return the tokens and the vocabulary of a tile: square if both are large, which moves the least memory."""
    budget = max(tile_bytes // itemsize, 1)
    token_tile = max(min(tokens, math.isqrt(budget)), 1)
    vocab_tile = max(min(vocabulary, budget // token_tile), 1)
    return max(min(tokens, budget // vocab_tile), 1), vocab_tile


def _slices(length: int, size: int) -> Iterator[slice]:
    for start in range(0, length, size):
        yield slice(start, min(start + size, length))
