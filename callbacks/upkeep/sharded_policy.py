"""The policy cut over the processes of the run (FSDP2)."""

from __future__ import annotations

from typing import Any, Literal

import torch
from lightning.pytorch import Trainer
from torch.distributed.fsdp import MixedPrecisionPolicy

from app.module import GRPOModule
from app.policy.sharding import Sharding
from app.runs.sharded_strategy import ShardedStrategy
from callbacks.stages import Stage, StepCallback
from datamodules.errors import UserError


class ShardedPolicy(StepCallback):
    """Cuts parameters, gradients and optimizer state by decoder layer with FSDP2, for any Hugging Face causal LM.

    Weights are read once, by rank 0, and given to the others. During rollouts by the Transformers engine every process
    holds the whole policy, in `compute_dtype`; vLLM servers are given one tensor at a time. Recomputing activations is
    the policy's own option (`model.policy.gradient_checkpointing`). Adapters (`model.policy.lora`) are cut as well.

    Args:
        shard_size: processes that hold one copy of the policy together; 0 for all of them. Fewer, for instance those
            of one machine, hold a copy each (hybrid sharding): less is sent between machines, more is stored.
        compute_dtype: of forward and backward passes and of rollouts; None is the policy's.
        reduce_dtype: gradients are added up over processes in it; None is the compute dtype.
        reshard_after_forward: free a layer's whole weights between its forward and its backward pass. Without it they
            are gathered once less and all of them are held meanwhile.
        cpu_offload: parts and optimizer state live in host memory (CUDA).
    """

    stage = Stage.PUSH_WEIGHTS

    def __init__(
        self,
        shard_size: int = 0,
        compute_dtype: Literal["bfloat16", "float16"] | None = None,
        reduce_dtype: Literal["float32", "bfloat16"] | None = "float32",
        reshard_after_forward: bool = True,
        cpu_offload: bool = False,
    ) -> None:
        if shard_size < 0:
            raise UserError(f"ShardedPolicy.shard_size={shard_size}: expected 0 (all processes) or more")
        self.shard_size = shard_size
        self.compute_dtype, self.reduce_dtype = compute_dtype, reduce_dtype
        self.reshard_after_forward = reshard_after_forward
        self.cpu_offload = cpu_offload

    def setup(self, trainer: Trainer, pl_module: GRPOModule, stage: str) -> None:
        """Before the policy is built. Raises UserError for sizes or options that do not fit."""
        self._check(trainer)
        pl_module.sharding = Sharding(
            device=trainer.strategy.root_device,
            shard_size=self.shard_size or trainer.world_size,
            precision=MixedPrecisionPolicy(_dtype(self.compute_dtype), _dtype(self.reduce_dtype)),
            offload=self.cpu_offload,
            reshard_after_forward=self.reshard_after_forward,
        )

    def _check(self, trainer: Trainer) -> None:
        strategy: Any = trainer.strategy
        if not isinstance(strategy, ShardedStrategy):
            raise UserError(
                f"callbacks.ShardedPolicy with trainer.strategy {type(strategy).__name__}: expected "
                "app.runs.sharded_strategy.ShardedStrategy (--config configs/strategy/fsdp2.yaml)"
            )
        if self.shard_size and trainer.world_size % self.shard_size:
            raise UserError(
                f"ShardedPolicy.shard_size={self.shard_size} with {trainer.world_size} processes: expected a divisor "
                "of their number, or 0 for all of them"
            )
        if self.cpu_offload and strategy.root_device.type == "cpu":
            raise UserError("ShardedPolicy.cpu_offload with a policy on the CPU: nothing to offload, leave it out")


def _dtype(name: str | None) -> torch.dtype | None:
    return None if name is None else getattr(torch, name)
