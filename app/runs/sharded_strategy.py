"""Lightning's strategy for a sharded policy, with checkpoints that need no pickle."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch.distributed.tensor import DTensor

from app.runs.background import Background
from app.runs.sharded_checkpoint import read_sharded, write_sharded

_TIMEOUT = timedelta(minutes=30)


class ShardedStrategy(ModelParallelStrategy):
    """`ModelParallelStrategy` (FSDP2); `callbacks.ShardedPolicy` decides how the policy is sharded.

    Args:
        sharded_checkpoints: if true, a checkpoint is a folder to which every rank writes its shard and from which any
            number of ranks can resume; if false, it is one file gathered on rank 0, which DDP and a single process can
            read too.
        process_group_backend: "gloo", "nccl", or both as "cpu:gloo,cuda:nccl"; chosen by device by default.
        timeout: a rank that takes longer than this in a collective operation is reported by name.
    """

    def __init__(
        self, sharded_checkpoints: bool = True, process_group_backend: str | None = None, timeout: timedelta = _TIMEOUT
    ) -> None:
        if process_group_backend is None and torch.cuda.is_available():
            process_group_backend = "cpu:gloo,cuda:nccl"  # with cpu_offload, norms of gradients are summed on the host
        super().__init__(
            save_distributed_checkpoint=sharded_checkpoints,
            process_group_backend=process_group_backend,
            timeout=timeout,
        )
        self.sharded_checkpoints = sharded_checkpoints

    def model_to_device(self) -> None:
        """Move the model to the device, unless its shards are kept on the host (`callbacks.ShardedPolicy.cpu_offload`).

        FSDP2 moves such shards itself when a layer needs them. Buffers are on the device already.
        """
        assert self.model is not None
        shards = [one.to_local() for one in self.model.parameters() if isinstance(one, DTensor)]
        if all(one.device.type == self.root_device.type for one in shards):
            super().model_to_device()

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any | None = None) -> None:
        if self.sharded_checkpoints:
            assert self.model is not None
            background = storage_options if isinstance(storage_options, Background) else None
            write_sharded(checkpoint, Path(self.broadcast(filepath)), self.model, background)
        else:
            super().save_checkpoint(checkpoint, filepath, storage_options)

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> Mapping[str, Any]:  # type: ignore[override]  # as in ParallelStrategy
        path = Path(self.broadcast(checkpoint_path))
        if not path.is_dir():
            return super().load_checkpoint(path, weights_only)
        assert self.model is not None
        return read_sharded(path, self.model, self.optimizers)
