"""What the processes of a run tell each other, and how work is dealt to them.

Every rank calls the same methods in the same order, whatever it holds: none is called in a branch that depends on the
rank or on the rank's own share.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
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
            LostRankError: some have ended, or did not come within the time limit; rank 0's message names them.
        """
        if self.size == 1:
            return
        # Not `monitored_barrier`, which does not say which rank it was that ended.
        if self.rank:
            self._tell(0, where)
            if why := self._miss(0):
                raise LostRankError(f"waiting for rank 0 ({where}): {why}; rank 0's own message says who is missing")
            return
        others = range(1, self.size)
        if lost := {rank: why for rank in others if (why := self._miss(rank))}:
            named = ", ".join(f"rank {rank} ({why})" for rank, why in lost.items())
            raise LostRankError(f"waiting for all ranks ({where}), lost {named}")
        for rank in others:
            self._tell(rank, where)

    def _tell(self, rank: int, where: str) -> None:
        with talking(where, rank):
            dist.send(torch.zeros(1), rank, self.group)

    def _miss(self, rank: int) -> str | None:
        """Why a rank's word did not come; None when it came."""
        try:
            dist.recv(torch.zeros(1), rank, self.group)
        except RuntimeError as error:
            return "no word within the time limit" if "imed out" in str(error) else "its process has ended"
        return None

    def gather(self, payload: bytes, where: str) -> list[bytes]:
        """What every rank gives, in the order of ranks.

        Raises:
            LostRankError: as `meet`.
        """
        if self.size == 1:
            return [payload]
        self.meet(where)
        with talking(where):
            return self._gather(payload)

    def _gather(self, payload: bytes) -> list[bytes]:
        sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(self.size)]
        dist.all_gather(sizes, torch.tensor([len(payload)]), group=self.group)
        longest = max(int(size) for size in sizes)
        padded = torch.zeros(longest, dtype=torch.uint8)
        padded[: len(payload)] = torch.from_numpy(np.frombuffer(payload, dtype=np.uint8).copy())
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
            with talking("sum"):
                dist.all_reduce(values, how, group=self.group)
        return values


@contextmanager
def talking(where: str, rank: int | None = None) -> Iterator[None]:
    """Makes the error of a failed collective, or of a message to `rank`, a LostRankError."""
    try:
        yield
    except RuntimeError as error:
        lost = "another rank" if rank is None else f"rank {rank}"
        raise LostRankError(f"lost {lost} ({where}): {str(error).splitlines()[0]}") from error


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
