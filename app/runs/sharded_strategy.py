"""Lightning's strategy for a policy that is cut over processes, with checkpoints that need no pickle."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

from lightning.pytorch.strategies import ModelParallelStrategy

from app.runs.sharded_checkpoint import read_sharded, write_sharded

_TIMEOUT = timedelta(minutes=30)


class ShardedStrategy(ModelParallelStrategy):
    """`ModelParallelStrategy` (FSDP2); `callbacks.ShardedPolicy` says how the policy is cut.

    Args:
        sharded_checkpoints: a checkpoint is a folder that every process writes its part of, and that any number of
            processes can go on from; else one file, put together on rank 0, that DDP and a single process read too.
        process_group_backend: "gloo" or "nccl"; by default what suits the device.
        timeout: a process that is later than this is reported by name.
    """

    def __init__(
        self,
        sharded_checkpoints: bool = True,
        process_group_backend: str | None = None,
        timeout: timedelta = _TIMEOUT,
    ) -> None:
        super().__init__(
            save_distributed_checkpoint=sharded_checkpoints,
            process_group_backend=process_group_backend,
            timeout=timeout,
        )

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any | None = None) -> None:
        if self._save_distributed_checkpoint:
            write_sharded(checkpoint, Path(self.broadcast(filepath)))
        else:
            super().save_checkpoint(checkpoint, filepath, storage_options)

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> Mapping[str, Any]:  # type: ignore[override]  # as the base of its base
        path = Path(self.broadcast(checkpoint_path))
        if not path.is_dir():
            return super().load_checkpoint(path, weights_only)
        assert self.model is not None
        return read_sharded(path, self.model, self.optimizers)
