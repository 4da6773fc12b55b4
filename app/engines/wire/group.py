"""A separate process group of the trainer (rank 0) and the servers' workers: gloo for CPU tensors, NCCL for CUDA."""

from __future__ import annotations

import socket
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from app.engines.wire.chunks import TensorSpec, as_bytes, layout, unpack

TIMEOUT = timedelta(minutes=5)


class WeightGroup:
    """One member of the group.

    Args:
        store: the members' rendezvous.
        rank: rank of this member; 0 sends.
        size: number of members.
        device: device of the broadcast tensors.
    """

    def __init__(self, store: dist.Store, rank: int, size: int, device: torch.device) -> None:
        self.device = device
        kind: Any = dist.ProcessGroupNCCL if device.type == "cuda" else dist.ProcessGroupGloo
        if device.type == "cuda":
            options = kind.Options()
            options._timeout = TIMEOUT  # torch has no public name for it here
            self._group = kind(store, rank, size, options)
        else:
            self._group = kind(store, rank, size, TIMEOUT)

    def send(self, chunk: Sequence[tuple[str, torch.Tensor]]) -> dist.Work:
        """Start to broadcast a chunk. The returned work is done when all members have received it."""
        starts, size = layout([TensorSpec.of(name, tensor) for name, tensor in chunk])
        flat = torch.empty(size, dtype=torch.uint8, device=self.device)
        for start, (_, tensor) in zip(starts, chunk, strict=True):
            data = as_bytes(tensor)
            flat[start : start + len(data)].copy_(data)
        return self._broadcast(flat)

    def receive(self, specs: Sequence[TensorSpec]) -> list[tuple[str, torch.Tensor]]:
        """Return the tensors of the chunk that rank 0 broadcasts, in new memory."""
        _, size = layout(specs)
        flat = torch.empty(size, dtype=torch.uint8, device=self.device)
        self._broadcast(flat).wait()
        return unpack(flat, specs)

    def _broadcast(self, flat: torch.Tensor) -> dist.Work:
        options = dist.BroadcastOptions()
        options.rootRank, options.rootTensor = 0, 0
        work: dist.Work = self._group.broadcast([flat], options)
        return work


class Rendezvous:
    """The rendezvous of a new group, on one address of the trainer's machine.

    Args:
        address: address of this machine as seen by the servers. It only listens there.
    """

    def __init__(self, address: str) -> None:
        self.address = address
        self._socket = socket.create_server((address, 0))
        self.port: int = self._socket.getsockname()[1]

    def open(self, size: int) -> dist.Store:
        """Return the trainer's store. It does not wait for the other members."""
        return dist.TCPStore(
            self.address,
            self.port,
            size,
            is_master=True,
            timeout=TIMEOUT,
            wait_for_workers=False,
            master_listen_fd=self._socket.detach(),
        )


def join(address: str, port: int, size: int) -> dist.Store:
    """Return the store of a rendezvous that the trainer has opened."""
    return dist.TCPStore(address, port, size, is_master=False, timeout=TIMEOUT, wait_for_workers=False)
