"""Checks that this version can train a run, made before anything is built."""

from __future__ import annotations

from lightning.pytorch import Trainer
from lightning.pytorch.strategies import DDPStrategy

from app.module import GRPOModule
from app.runs.sharded_strategy import ShardedStrategy
from callbacks.stages import Stage, StepCallback
from callbacks.upkeep.sharded_policy import ShardedPolicy
from datamodules.errors import UserError
from datamodules.online import OnlinePromptDataModule

_PRECISIONS = ("32-true", "bf16-mixed", "64-true")


class RunChecks(StepCallback):
    """Refuses unsupported precisions and strategies, and more processes than a mini-batch has prompts."""

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
        if trainer.precision not in _PRECISIONS:
            # 16-true and bf16-true round the trained weights to 16 bits, in which most updates vanish; 16-mixed scales
            # gradients, which are clipped and checked here as they are.
            raise UserError(
                f"trainer.precision is {trainer.precision}, expected one of {', '.join(_PRECISIONS)}. Use bf16-mixed "
                "to compute in 16 bits: the weights, which need more, stay in float32."
            )
        if ranks == 1:
            return
        if not isinstance(strategy, DDPStrategy | ShardedStrategy):
            raise UserError(
                f"trainer.strategy is {type(strategy).__name__} with {ranks} processes, but only DDP and FSDP2 are "
                "supported. Use --config configs/strategy/ddp.yaml or fsdp2.yaml."
            )
        if datamodule.prompts_per_step // module.mini_batches < ranks:
            raise UserError(
                f"{ranks} processes (trainer.devices x trainer.num_nodes) share "
                f"data.prompts_per_step={datamodule.prompts_per_step} in model.mini_batches={module.mini_batches}, but "
                "every process needs a prompt in every mini-batch. Set data.prompts_per_step to at least "
                f"{ranks * module.mini_batches}, or use fewer processes."
            )
