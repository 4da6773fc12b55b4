"""A process group of its own between the trainer and the servers' workers, beside whatever groups either already has.

The trainer is rank 0; gloo carries CPU tensors, NCCL carries CUDA tensors.
"""

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
    """One member's end of the group.

    Args:
        store: where the members meet.
        rank: 0 sends.
        size: members.
        device: of the tensors broadcast.
    """

    def __init__(self, store: dist.Store, rank: int, size: int, device: torch.device) -> None:
        self.device = device
        kind: Any = dist.ProcessGroupNCCL if device.type == "cuda" else dist.ProcessGroupGloo
        if device.type == "cuda":
            options = kind.Options()
            options._timeout = TIMEOUT
            self._group = kind(store, rank, size, options)
        else:
            self._group = kind(store, rank, size, TIMEOUT)

    def send(self, chunk: Sequence[tuple[str, torch.Tensor]]) -> Any:
        """Starts to send a chunk to all; the work that it returns is done when they have it."""
        starts, size = layout([TensorSpec.of(name, tensor) for name, tensor in chunk])
        flat = torch.empty(size, dtype=torch.uint8, device=self.device)
        for start, (_, tensor) in zip(starts, chunk, strict=True):
            data = as_bytes(tensor)
            flat[start : start + len(data)].copy_(data)
        return self._broadcast(flat)

    def receive(self, specs: Sequence[TensorSpec]) -> list[tuple[str, torch.Tensor]]:
        """The tensors of the chunk that rank 0 sends, in memory of their own."""
        _, size = layout(specs)
        flat = torch.empty(size, dtype=torch.uint8, device=self.device)
        self._broadcast(flat).wait()
        return unpack(flat, specs)

    def _broadcast(self, flat: torch.Tensor) -> Any:
        options = dist.BroadcastOptions()
        options.rootRank, options.rootTensor = 0, 0
        return self._group.broadcast([flat], options)


class Rendezvous:
    """The store that a new group meets at, on one address of the trainer's machine.

    Args:
        address: this machine's, as the servers reach it. Only there does it listen.
    """

    def __init__(self, address: str) -> None:
        self.address = address
        self._socket = socket.create_server((address, 0))
        self.port: int = self._socket.getsockname()[1]

    def open(self, size: int) -> dist.Store:
        """The trainer's store; the members come as they will."""
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
    """The store of a group that the trainer has opened."""
    return dist.TCPStore(address, port, size, is_master=False, timeout=TIMEOUT, wait_for_workers=False)
