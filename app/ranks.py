"""What the processes of a run tell each other, and how work is dealt to them.

Every rank calls the same methods in the same order, whatever it holds: none is called in a branch that depends on the
rank or on the rank's own share.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from datamodules.errors import UserError


class LostRankError(UserError):
    """Another process ended, or did not come within the time limit of the process group."""


@dataclass(frozen=True, slots=True)
class Ranks:
    """The processes of a run, as one of them sees them. The default is a run of one process.

    Attributes:
        rank: of this process.
        size: of the run, `R`.
        group: for what lies on the host; gloo.
    """

    rank: int = 0
    size: int = 1
    group: Any = None

    @classmethod
    def of_run(cls) -> Ranks:
        """Those of the default process group; to be called by all of them. The time limit is the group's."""
        if not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1:
            return cls()
        # What is exchanged lies on the host. A group of its own is made only where the default one cannot carry it.
        group = dist.group.WORLD if dist.get_backend() == "gloo" else dist.new_group(backend="gloo")
        return cls(dist.get_rank(), dist.get_world_size(), group)

    def meet(self, where: str) -> None:
        """Waits for all ranks.

        Args:
            where: what they meet for, for the message.

        Raises:
            LostRankError: some have ended or hang; rank 0's message names them.
        """
        if self.size == 1:
            return
        try:
            dist.monitored_barrier(self.group, wait_all_ranks=True)
        except RuntimeError as error:
            raise LostRankError(f"waiting for the other ranks ({where}): {str(error).splitlines()[0]}") from error

    def gather(self, payload: bytes, where: str) -> list[bytes]:
        """What every rank gives, in the order of ranks.

        Raises:
            LostRankError: as `meet`.
        """
        if self.size == 1:
            return [payload]
        self.meet(where)
        sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(self.size)]
        dist.all_gather(sizes, torch.tensor([len(payload)]), group=self.group)
        longest = max(int(size) for size in sizes)
        padded = torch.zeros(longest, dtype=torch.uint8)
        padded[: len(payload)] = torch.frombuffer(bytearray(payload), dtype=torch.uint8)
        received = [torch.empty_like(padded) for _ in range(self.size)]
        dist.all_gather(received, padded, group=self.group)
        return [part[: int(size)].numpy().tobytes() for part, size in zip(received, sizes, strict=True)]

    def sum(self, values: Tensor) -> Tensor:
        """Of all ranks; a new tensor on the host."""
        return self._reduced(values, dist.ReduceOp.SUM)

    def max(self, values: Tensor) -> Tensor:
        """Of all ranks, element by element; a new tensor on the host."""
        return self._reduced(values, dist.ReduceOp.MAX)

    def any(self, flag: bool) -> bool:
        """Whether it is set on some rank."""
        return bool(self.max(torch.tensor(int(flag))))

    def _reduced(self, values: Tensor, how: Any) -> Tensor:
        values = values.detach().to("cpu", copy=True)
        if self.size > 1:
            dist.all_reduce(values, how, group=self.group)
        return values


def deal(sizes: Sequence[int], ranks: int) -> list[list[int]]:
    """Deals pieces of work so that the largest share is small: the largest piece first, to whoever has least.

    Graham's LPT rule (1969): the largest share is at most 4/3 of the best possible.

    Args:
        sizes: of the pieces.
        ranks: shares, `R`.

    Returns:
        Positions in `sizes` of each share, ascending; each appears exactly once. Depends on the arguments alone.
    """
    shares: list[list[int]] = [[] for _ in range(ranks)]
    loads = [(0, rank) for rank in range(ranks)]
    for piece in sorted(range(len(sizes)), key=lambda index: (-sizes[index], index)):
        load, rank = heapq.heappop(loads)
        shares[rank].append(piece)
        heapq.heappush(loads, (load + sizes[piece], rank))
    return [sorted(share) for share in shares]


def imbalance(sizes: Sequence[int], shares: Sequence[Sequence[int]]) -> float:
    """By how much the largest share exceeds the mean one: 0.1 means that the other ranks wait a tenth of the work."""
    loads = [sum(sizes[piece] for piece in share) for share in shares]
    return max(loads) * len(loads) / sum(loads) - 1 if sum(loads) else 0.0
