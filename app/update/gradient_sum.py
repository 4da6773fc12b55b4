"""Gradients of all ranks added up, once per optimizer step.

DDP's own reduction belongs to single backward passes. Here a step has several micro-batches, and the ranks have
different numbers of them, some of them none: one explicit sum after the last one is right for all of these. It is a
sum, not a mean, because a token's weight is already that of the global mini-batch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from app.ranks import Ranks, talking

_BUCKET = 1 << 24
"""Elements that are reduced together: 64 MiB, what the sum needs beside the gradients."""


@torch.no_grad()
def sum_gradients(parameters: Sequence[torch.nn.Parameter], ranks: Ranks) -> None:
    """Makes every parameter's gradient the sum over ranks, in float32 or better; one that has it on no rank keeps None.

    Args:
        parameters: the trained ones; the same on all ranks, in the same order.
        ranks: the processes.
    """
    if ranks.size == 1:
        return
    ranks.meet("update")
    reached = ranks.max(torch.tensor([parameter.grad is not None for parameter in parameters], dtype=torch.uint8))
    chosen = [parameter for parameter, used in zip(parameters, reached.tolist(), strict=True) if used]
    for parameter in chosen:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    for bucket in _buckets([parameter.grad for parameter in chosen if parameter.grad is not None]):
        flat = torch.cat([gradient.reshape(-1).to(_sum_dtype(gradient)) for gradient in bucket])
        with talking("update"):
            dist.all_reduce(flat)
        for gradient, summed in zip(bucket, flat.split([gradient.numel() for gradient in bucket]), strict=True):
            gradient.copy_(summed.view_as(gradient))


def _sum_dtype(gradient: Tensor) -> torch.dtype:
    return torch.promote_types(gradient.dtype, torch.float32)


def _buckets(gradients: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    bucket: list[Tensor] = []
    room = _BUCKET
    for gradient in gradients:
        if bucket and gradient.numel() > room:
            yield bucket
            bucket, room = [], _BUCKET
        bucket.append(gradient)
        room -= gradient.numel()
    if bucket:
        yield bucket
