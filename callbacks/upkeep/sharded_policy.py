"""The policy sharded over the ranks of the run (FSDP2)."""

from __future__ import annotations

from typing import Literal

import torch
from lightning.pytorch import Trainer
from torch.distributed.fsdp import MixedPrecisionPolicy

from app.module import GRPOModule
from app.policy.sharding import Sharding
from app.runs.sharded_strategy import ShardedStrategy
from callbacks.stages import Stage, StepCallback
from datamodules.errors import UserError


class ShardedPolicy(StepCallback):
    """Shards parameters, gradients and optimizer state by decoder layer with FSDP2, for any Hugging Face causal LM.

    Rank 0 reads the weights and sends the other ranks their shards. During rollouts by the Transformers engine every
    rank holds the whole policy in `compute_dtype`; vLLM servers receive one gathered tensor at a time. Adapters
    (`model.policy.lora`) are sharded too. For activation checkpointing set `model.policy.gradient_checkpointing`.

    Args:
        shard_size: number of ranks that hold one copy of the policy together; 0 for all ranks. Fewer, such as the ranks
            of one machine (hybrid sharding), need more memory and less communication between machines.
        compute_dtype: dtype of forward and backward passes and of rollouts; null for the policy's, or bfloat16 on GPUs
            with trainer.precision bf16-mixed.
        reduce_dtype: dtype in which gradients are summed over ranks; null for the compute dtype.
        reshard_after_forward: free a layer's gathered weights after its forward pass and gather them again for the
            backward pass. False saves the second gather but keeps all gathered weights in memory.
        cpu_offload: keep shards and optimizer state in host memory (CUDA only).
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
            raise UserError(f"ShardedPolicy.shard_size is {shard_size}, expected at least 0. Set 0 for all processes.")
        self.shard_size = shard_size
        self.compute_dtype, self.reduce_dtype = compute_dtype, reduce_dtype
        self.reshard_after_forward = reshard_after_forward
        self.cpu_offload = cpu_offload

    def setup(self, trainer: Trainer, pl_module: GRPOModule, stage: str) -> None:
        strategy = trainer.strategy
        if not isinstance(strategy, ShardedStrategy):
            raise UserError(
                f"callbacks.ShardedPolicy is used with trainer.strategy {type(strategy).__name__}, expected "
                "app.runs.sharded_strategy.ShardedStrategy. Use --config configs/strategy/fsdp2.yaml."
            )
        if self.shard_size and trainer.world_size % self.shard_size:
            raise UserError(
                f"ShardedPolicy.shard_size is {self.shard_size}, expected a divisor of the {trainer.world_size} "
                "processes. Change it, or set 0 for all of them."
            )
        if self.cpu_offload and strategy.root_device.type == "cpu":
            raise UserError(
                "ShardedPolicy.cpu_offload is true, but the policy is already on the CPU. Remove it or train on CUDA."
            )
        halves = trainer.precision == "bf16-mixed" and strategy.root_device.type == "cuda"
        compute_dtype = self.compute_dtype or ("bfloat16" if halves else None)
        # Lightning builds the policy after this hook.
        pl_module.sharding = Sharding(
            device=strategy.root_device,
            shard_size=self.shard_size or trainer.world_size,
            precision=MixedPrecisionPolicy(_dtype(compute_dtype), _dtype(self.reduce_dtype)),
            offload=self.cpu_offload,
            reshard_after_forward=self.reshard_after_forward,
        )


def _dtype(name: str | None) -> torch.dtype | None:
    return None if name is None else getattr(torch, name)
