"""The policy that a selection measures: a checkpoint's, the initial one, or one warmed up by plain GRPO."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import Logger, TensorBoardLogger

from app.module import GRPOModule
from app.policy.weights import checkpoint_weights
from app.runs.folder import LAST
from app.subsets.measurements import replacing
from datamodules.errors import UserError
from datamodules.online import OnlinePromptDataModule

_FOLDER, _POLICY = "warmup", "policy.ckpt"


class WarmupTrainer(Protocol):
    """Builds the trainer of a warm-up."""

    def __call__(self, *, logger: Logger, max_steps: int) -> Trainer:
        """Return a trainer for plain GRPO in the folder of the logger, with the run's device and precision.

        It has the standard callbacks, but no reference rollouts, replay, filter or validation.
        """


def warmed_up(
    module: GRPOModule, datamodule: OnlinePromptDataModule, warmup_trainer: WarmupTrainer, steps: int, folder: Path
) -> Path:
    """Return the checkpoint of the policy after `steps` batches of random prompts; train it unless it exists.

    The warm-up is a normal run in `folder/warmup`, with TensorBoard events, config.yaml and summary.json, and is
    resumed from its last checkpoint.

    Raises:
        UserError: the warm-up was stopped before its last step.
    """
    finished = folder / _FOLDER / _POLICY
    if finished.is_file():
        return finished
    logger = TensorBoardLogger(str(folder), name=_FOLDER, version="", default_hp_metric=False)
    trainer = warmup_trainer(logger=logger, max_steps=steps * module.mini_batches)
    last = folder / _FOLDER / "checkpoints" / LAST
    trainer.fit(module, datamodule=datamodule, ckpt_path=str(last) if last.is_file() else None, weights_only=True)
    if trainer.global_step < trainer.max_steps:
        done = f"step {trainer.global_step} of {trainer.max_steps}"
        raise UserError(f"The warm-up was stopped at {done}. Repeat the command to resume it.")
    with replacing(finished) as temporary:
        torch.save({"state_dict": module.state_dict()}, temporary)
    return finished


def load_policy(module: GRPOModule, checkpoint: Path | None) -> None:
    """Load the module's policy, with the weights of the checkpoint if there is one."""
    module.configure_model()
    if checkpoint is not None:
        module.policy_model.load_state_dict(checkpoint_weights(checkpoint))
