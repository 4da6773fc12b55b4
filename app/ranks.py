"""Communication between the processes of a run, and the split of work among them.

All ranks call the same methods in the same order: never in a branch that depends on the rank or on its share of the
work.
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

_ADVICE = "Look at the output of the lost process and resume with --ckpt_path last."


class LostRankError(UserError):
    """Another process ended, or exceeded the time limit of the process group."""


@dataclass(frozen=True, slots=True)
class Ranks:
    """The processes of a run, as seen by one of them. The default is a run of one process.

    Attributes:
        rank: this process.
        size: processes of the run, `R`.
        group: the gloo process group, for tensors on the host.
    """

    rank: int = 0
    size: int = 1
    group: Any = None

    @classmethod
    def of_run(cls) -> Ranks:
        """Return the ranks of the default process group, with its time limit. Collective."""
        if not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1:
            return cls()
        # Tensors are exchanged on the host, so a second group is needed only if the default one isn't gloo.
        group = dist.group.WORLD if dist.get_backend() == "gloo" else dist.new_group(backend="gloo")
        return cls(dist.get_rank(), dist.get_world_size(), group)

    def barrier(self, where: str) -> None:
        """Wait for all ranks; `where` names the meeting point in the message.

        Raises:
            LostRankError: some ranks have ended or exceeded the time limit; rank 0's message names them.
        """
        if self.size == 1:
            return
        # Not `monitored_barrier`, which does not say which rank ended.
        if self.rank:
            with collective(where, 0):
                dist.send(torch.zeros(1), 0, self.group)
            if why := self._receive_from(0):
                raise LostRankError(f"waiting for rank 0 ({where}): {why}. Its own message names the lost rank.")
            return
        others = range(1, self.size)
        if lost := {rank: why for rank in others if (why := self._receive_from(rank))}:
            named = ", ".join(f"rank {rank} ({why})" for rank, why in lost.items())
            raise LostRankError(f"waiting for all ranks ({where}), lost {named}. {_ADVICE}")
        for rank in others:
            with collective(where, rank):
                dist.send(torch.zeros(1), rank, self.group)

    def _receive_from(self, rank: int) -> str | None:
        """Wait for a rank's message; return the reason if it did not come."""
        try:
            dist.recv(torch.zeros(1), rank, self.group)
        except RuntimeError as error:
            return "no message within the time limit" if "imed out" in str(error) else "its process has ended"
        return None

    def gather(self, payload: bytes, where: str) -> list[bytes]:
        """Return every rank's payload, in the order of ranks.

        Raises:
            LostRankError: as `barrier`.
        """
        if self.size == 1:
            return [payload]
        self.barrier(where)
        with collective(where):
            sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(self.size)]
            dist.all_gather(sizes, torch.tensor([len(payload)]), group=self.group)
            longest = max(int(size) for size in sizes)
            padded = torch.zeros(longest, dtype=torch.uint8)
            padded[: len(payload)] = torch.from_numpy(np.frombuffer(payload, dtype=np.uint8).copy())
            received = [torch.empty_like(padded) for _ in range(self.size)]
            dist.all_gather(received, padded, group=self.group)
            return [part[: int(size)].numpy().tobytes() for part, size in zip(received, sizes, strict=True)]

    def sum(self, values: Tensor) -> Tensor:
        """Return the sum over ranks, a new tensor on the host."""
        return self._reduce(values, dist.ReduceOp.SUM)

    def max(self, values: Tensor) -> Tensor:
        """Return the elementwise maximum over ranks, a new tensor on the host."""
        return self._reduce(values, dist.ReduceOp.MAX)

    def any(self, flag: bool) -> bool:
        """Return whether the flag is set on any rank."""
        return bool(self.max(torch.tensor(int(flag))))

    def _reduce(self, values: Tensor, operation: dist.ReduceOp.RedOpType) -> Tensor:
        values = values.detach().to("cpu", copy=True)
        if self.size > 1:
            with collective("reduce"):
                dist.all_reduce(values, operation, group=self.group)
        return values


@contextmanager
def collective(where: str, rank: int | None = None) -> Iterator[None]:
    """Turn the failure of a collective, or of a message to or from `rank`, into a `LostRankError`."""
    try:
        yield
    except RuntimeError as error:
        lost = "another rank" if rank is None else f"rank {rank}"
        reason = str(error).splitlines()[0]
        raise LostRankError(f"lost {lost} ({where}): {reason}. {_ADVICE}") from error


def deal(sizes: Sequence[int], ranks: int) -> list[list[int]]:
    """Split work into balanced shares: the largest piece first, each to the rank with the least work.

    Graham's LPT rule (1969): the largest share is at most 4/3 of the best possible.

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
    """Return the excess of the largest share over the mean share: at 0.1 the other ranks wait a tenth of the work."""
    loads = [sum(sizes[piece] for piece in share) for share in shares]
    return max(loads) * len(loads) / sum(loads) - 1 if sum(loads) else 0.0
