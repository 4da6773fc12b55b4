"""Whether a run of several processes is one that this version trains, before anything is built."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Callback, Trainer
from lightning.pytorch.strategies import DDPStrategy

from app.runs.sharded_strategy import ShardedStrategy
from callbacks.upkeep.sharded_policy import ShardedPolicy
from datamodules.errors import UserError


def check_ranks(trainer: Trainer, pl_module: Any) -> None:
    """Checks strategy and sizes.

    Raises:
        UserError: another strategy than DDP or FSDP2, or more ranks than a mini-batch has prompts.
    """
    ranks, strategy = trainer.world_size, trainer.strategy
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]  # set by a connector
    if isinstance(strategy, ShardedStrategy) and not any(isinstance(one, ShardedPolicy) for one in callbacks):
        raise UserError(
            "trainer.strategy is ShardedStrategy and trainer.callbacks holds no callbacks.ShardedPolicy, which cuts "
            "the policy: add it (--config configs/strategy/fsdp2.yaml)"
        )
    if ranks == 1:
        return
    if not isinstance(strategy, DDPStrategy | ShardedStrategy):
        raise UserError(
            f"trainer.strategy is {type(strategy).__name__} with {ranks} processes: expected DDP or FSDP2 "
            "(--config configs/strategy/ddp.yaml or fsdp2.yaml)"
        )
    prompts: int = trainer.datamodule.prompts_per_step  # type: ignore[attr-defined]  # Lightning leaves it untyped
    parts: int = pl_module.mini_batches
    if prompts // parts < ranks:
        raise UserError(
            f"{ranks} processes (trainer.devices x trainer.num_nodes) and data.prompts_per_step={prompts} in "
            f"model.mini_batches={parts}: expected a prompt for every process in a mini-batch, that is at least "
            f"{ranks * parts} prompts per step"
        )
