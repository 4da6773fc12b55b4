"""A separate process group of the trainer (rank 0) and the servers' workers: gloo for CPU tensors, NCCL for CUDA."""

from __future__ import annotations

import socket
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from app.engines.wire.chunks import TensorSpec, layout, pack, unpack

TIMEOUT = timedelta(minutes=5)


class WeightGroup:
    """One of the group's `size` members, which meet at `store`. Rank 0 sends; `device` holds what is broadcast."""

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
        _, size = layout([TensorSpec.of(name, tensor) for name, tensor in chunk])
        flat = torch.empty(size, dtype=torch.uint8, device=self.device)
        pack(chunk, flat)
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


def open_store(address: str, size: int) -> dist.TCPStore:
    """Return the trainer's store, which listens on one address of its machine and does not wait for other members."""
    listener = socket.create_server((address, 0))
    port, descriptor = listener.getsockname()[1], listener.detach()
    return dist.TCPStore(
        address, port, size, is_master=True, timeout=TIMEOUT, wait_for_workers=False, master_listen_fd=descriptor
    )


def join(address: str, port: int, size: int) -> dist.Store:
    """Return the store that the trainer has opened."""
    return dist.TCPStore(address, port, size, is_master=False, timeout=TIMEOUT, wait_for_workers=False)
