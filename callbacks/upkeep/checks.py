"""Checks that this version can train a run, made before anything is built."""

from __future__ import annotations

import os

from lightning.pytorch import Trainer
from lightning.pytorch.strategies import DDPStrategy, ParallelStrategy

from app.engines import VllmServer
from app.engines.server.placement import server_gpus
from app.module import GRPOModule
from app.policy.liger import refuse_liger
from app.runs.sharded_strategy import ShardedStrategy
from callbacks.stages import Stage, StepCallback
from callbacks.upkeep.sharded_policy import ShardedPolicy
from datamodules.errors import UserError
from datamodules.online import OnlinePromptDataModule

_PRECISIONS = ("32-true", "bf16-mixed", "64-true")
_TOKEN_BYTES = 12
"""Of a completion's token in memory, at least: its id (8) and its log-probability (4)."""


class RunChecks(StepCallback):
    """Refuses unsupported precisions and strategies, and steps that can't be held in memory or divided."""

    stage = Stage.PUSH_WEIGHTS

    def setup(self, trainer: Trainer, pl_module: GRPOModule, stage: str) -> None:
        if stage != "fit":  # for which the trainer checks before anything is written
            self.check(trainer, pl_module, OnlinePromptDataModule.of(trainer))

    def check(self, trainer: Trainer, module: GRPOModule, datamodule: OnlinePromptDataModule) -> None:
        kinds = [type(one) for one in StepCallback.all_of(trainer)]
        ranks, strategy = trainer.world_size, trainer.strategy
        if isinstance(strategy, ShardedStrategy) and not any(issubclass(kind, ShardedPolicy) for kind in kinds):
            raise UserError(
                "trainer.strategy is ShardedStrategy, but trainer.callbacks lists no callbacks.ShardedPolicy to shard "
                "the policy. Add it, or use --config configs/strategy/fsdp2.yaml."
            )
        if ranks > 1 and not isinstance(strategy, DDPStrategy | ShardedStrategy):
            raise UserError(
                f"trainer.strategy is {type(strategy).__name__} with {ranks} processes, but only DDP and FSDP2 are "
                "supported. Use --config configs/strategy/ddp.yaml or fsdp2.yaml."
            )
        check_settings(str(trainer.precision), module, datamodule, ranks)
        if module.policy.kernels == "liger":
            refuse_liger(strategy.root_device.type, str(trainer.precision), compiles=module.compiles)
        engine = module.engine
        if isinstance(engine, VllmServer) and not engine.urls:
            server_gpus(engine.server.devices, engine.server.tensor_parallel_size, gpus_of_trainer(trainer))


def gpus_of_trainer(trainer: Trainer) -> list[int]:
    """Return the indices of the GPUs that the training processes of this machine use."""
    strategy = trainer.strategy
    devices = (strategy.parallel_devices if isinstance(strategy, ParallelStrategy) else None) or [strategy.root_device]
    return [one.index or 0 for one in devices if one.type == "cuda"]


def check_settings(precision: str, module: GRPOModule, datamodule: OnlinePromptDataModule, ranks: int) -> None:
    """Raise UserError for a precision that cannot train, and for steps that can't be held or divided over `ranks`."""
    if precision not in _PRECISIONS:
        # 16-true and bf16-true round the trained weights to 16 bits, in which most updates vanish; 16-mixed scales
        # gradients, which are clipped and checked here as they are.
        raise UserError(
            f"trainer.precision is {precision}, expected one of {', '.join(_PRECISIONS)}. Use bf16-mixed "
            "to compute in 16 bits: the weights, which need more, stay in float32."
        )
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for prompts, name, sampling in (
        (datamodule.prompts_per_step, "sampling", module.sampling),
        (datamodule.val_batch_size, "val_sampling", module.val_sampling),
    ):
        tokens = prompts * sampling.num_generations * sampling.max_completion_length
        if tokens * _TOKEN_BYTES > memory:
            raise UserError(
                f"model.{name} generates {sampling.num_generations:,} completions of up to "
                f"{sampling.max_completion_length:,} tokens for each of {prompts:,} prompts, which take "
                f"{tokens * _TOKEN_BYTES >> 30:,} GiB, but this machine has {memory >> 30} GiB. Lower "
                "num_generations."
            )
    if module.mini_batches > datamodule.prompts_per_step:
        raise UserError(
            f"model.mini_batches is {module.mini_batches}, but a step has {datamodule.prompts_per_step} prompts "
            "(data.prompts_per_step), whose completions stay together. Lower it."
        )
    if ranks > 1 and datamodule.prompts_per_step // module.mini_batches < ranks:
        raise UserError(
            f"{ranks} processes (trainer.devices x trainer.num_nodes) share "
            f"data.prompts_per_step={datamodule.prompts_per_step} in model.mini_batches={module.mini_batches}, but "
            "every process needs a prompt in every mini-batch. Set data.prompts_per_step to at least "
            f"{ranks * module.mini_batches}, or use fewer processes."
        )
