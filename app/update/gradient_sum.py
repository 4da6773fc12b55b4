"""The sum of gradients over ranks, once per optimizer step.

DDP's wrapper, which is left out, reduces gradients in each backward pass. A step here has several micro-batches, and
ranks may have different numbers of them or none; one explicit sum after the last one is correct for all of these. It is
a sum and not a mean, because a token's weight is already that of the global mini-batch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from app.ranks import Ranks, collective

_BUCKET = 1 << 24
"""Elements that are reduced together: 64 MiB, the memory that the sum needs in addition to the gradients."""


@torch.no_grad()
def sum_gradients(parameters: Sequence[torch.nn.Parameter], ranks: Ranks) -> None:
    """Replace every gradient by its sum over ranks, computed in float32 or wider. Collective.

    The parameters are in the same order on all ranks; one without a gradient on any rank keeps None.
    """
    if ranks.size == 1:
        return
    ranks.barrier("update")
    reached = ranks.max(torch.tensor([parameter.grad is not None for parameter in parameters], dtype=torch.uint8))
    chosen = [parameter for parameter, used in zip(parameters, reached.tolist(), strict=True) if used]
    for parameter in chosen:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    for bucket in _buckets([parameter.grad for parameter in chosen if parameter.grad is not None]):
        flat = torch.cat([grad.reshape(-1).to(torch.promote_types(grad.dtype, torch.float32)) for grad in bucket])
        with collective("update"):
            dist.all_reduce(flat)
        for gradient, summed in zip(bucket, flat.split([gradient.numel() for gradient in bucket]), strict=True):
            gradient.copy_(summed.view_as(gradient))


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
