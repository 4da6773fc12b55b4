"""Chunks of weights in GPU memory that another process of this host maps (CUDA IPC), without a copy on the host.

Never run on a GPU by the project's own tests.
"""

from __future__ import annotations

import json
from collections.abc import Sequence

import torch
from torch.multiprocessing.reductions import rebuild_cuda_tensor, reduce_tensor

from app.engines.wire.chunks import TensorSpec, layout, pack, unpack


def name_of_gpu(device: torch.device) -> str:
    """Return the UUID of a GPU, which is its name in all processes; "" for the CPU."""
    return str(torch.cuda.get_device_properties(device).uuid) if device.type == "cuda" else ""


def visible_gpus() -> dict[str, torch.device]:
    """Return the GPUs that this process sees, by UUID."""
    devices = [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
    return {name_of_gpu(device): device for device in devices}


class MappedBuffers:
    """The trainer's end: a buffer on the GPU of each worker, which the worker maps once and every chunk passes through.

    Args:
        devices: the GPUs, by UUID.
        size: of each buffer, in bytes.
    """

    def __init__(self, devices: dict[str, torch.device], size: int) -> None:
        self.size = size
        self._buffers = {gpu: torch.empty(size, dtype=torch.uint8, device=one) for gpu, one in devices.items()}

    def handles(self) -> str:
        """Return what a worker needs to map its buffer. Each worker must map it exactly once."""
        shared = {gpu: reduce_tensor(buffer)[1][7:] for gpu, buffer in self._buffers.items()}
        return json.dumps({gpu: [_to_text(one) for one in parts] for gpu, parts in shared.items()})

    def write(self, chunk: Sequence[tuple[str, torch.Tensor]]) -> list[TensorSpec]:
        """Copy a chunk of at most `size` bytes into all buffers, and return its contents once it is there.

        The workers must have read the chunk before the next one is written.
        """
        for buffer in self._buffers.values():
            pack(chunk, buffer)
        for buffer in self._buffers.values():
            torch.cuda.synchronize(buffer.device)
        return [TensorSpec.of(name, tensor) for name, tensor in chunk]


def map_buffer(handles: str, device: torch.device) -> torch.Tensor:
    """Return the buffer (uint8 `[size]`) that the trainer has made on a worker's GPU.

    Raises:
        KeyError: the trainer has made none there.
        RuntimeError: CUDA cannot map it, e.g. between containers without `--ipc=host`.
    """
    parts = [_from_text(one) for one in json.loads(handles)[name_of_gpu(device)]]
    size, stride, start = (parts[1],), (1,), 0
    buffer: torch.Tensor = rebuild_cuda_tensor(
        torch.Tensor, size, stride, start, torch.storage.TypedStorage, torch.uint8, device.index or 0, *parts
    )
    return buffer


def read_chunk(buffer: torch.Tensor, specs: Sequence[TensorSpec]) -> list[tuple[str, torch.Tensor]]:
    """Return the names and tensors of a chunk, in memory of their own: vLLM keeps them until a layer is whole."""
    _, size = layout(specs)
    own = buffer[:size].clone()
    if own.is_cuda:
        torch.cuda.synchronize(own.device)
    return unpack(own, specs)


def _to_text(part: object) -> object:
    return {"bytes": part.hex()} if isinstance(part, bytes) else part


def _from_text(part: object) -> object:
    return bytes.fromhex(part["bytes"]) if isinstance(part, dict) else part
