"""The policy that a selection looks at: a checkpoint's, the initial one, or one warmed up by plain GRPO."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.loggers import TensorBoardLogger

from app.module import GRPOModule
from app.policy.weights import checkpoint_weights
from app.runs.folder import LAST
from datamodules.errors import UserError
from datamodules.online import OnlinePromptDataModule

_PLAIN_GRPO = ("WeightSync", "Rollouts", "RandomState", "RunLedger", "RunProgress", "RunCheckpoint")
"""The callbacks of a config that plain GRPO needs: no reference rollouts, no replay, no filter, no validation."""

_FOLDER, _POLICY = "warmup", "policy.ckpt"


def warmed_up(
    trainer: Trainer, module: GRPOModule, datamodule: OnlinePromptDataModule, steps: int, folder: Path
) -> Path:
    """The checkpoint of the policy after `steps` batches of uniformly chosen prompts; trained unless it is there.

    A warm-up that was stopped goes on from its last checkpoint. It is a run like any other, with TensorBoard events,
    config.yaml and summary.json, in `folder/warmup`.

    Raises UserError when the config's callbacks roll nothing out.
    """
    finished = folder / _FOLDER / _POLICY
    if not finished.is_file():
        _train(trainer, module, datamodule, steps, folder)
        temporary = finished.with_name(f".{_POLICY}.tmp")
        torch.save({"state_dict": module.state_dict()}, temporary)
        os.replace(temporary, finished)
    return finished


def load_policy(module: GRPOModule, checkpoint: Path | None) -> None:
    """The module with its policy, that of the checkpoint if there is one."""
    module.configure_model()
    if checkpoint is not None:
        module.policy_model.load_state_dict(checkpoint_weights(checkpoint))


def _train(trainer: Trainer, module: GRPOModule, datamodule: OnlinePromptDataModule, steps: int, folder: Path) -> None:
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]  # set by a connector
    trainer.callbacks = [one for one in callbacks if _is_plain(one)]  # type: ignore[attr-defined]
    if not any(type(one).__name__ == "Rollouts" for one in trainer.callbacks):  # type: ignore[attr-defined]
        raise UserError("trainer.callbacks lists no callbacks.Rollouts: the warm-up needs it, as `dots fit` does")
    for callback in trainer.checkpoint_callbacks:
        callback.dirpath = None  # type: ignore[attr-defined]  # a run's own folder is not the warm-up's
    trainer.logger = TensorBoardLogger(str(folder), name=_FOLDER, version="", default_hp_metric=False)
    trainer.limit_val_batches = 0
    trainer.fit_loop.epoch_loop.max_steps = steps * module.mini_batches
    last = folder / _FOLDER / "checkpoints" / LAST
    trainer.fit(module, datamodule=datamodule, ckpt_path=str(last) if last.is_file() else None, weights_only=True)
    if trainer.global_step < trainer.max_steps:
        raise UserError(f"the warm-up was stopped at step {trainer.global_step}: repeat the command to go on")


def _is_plain(callback: Callback) -> bool:
    """Whether it is Lightning's own, or one (or a subclass of one) that plain GRPO needs."""
    return type(callback).__module__.startswith("lightning.") or any(
        kind.__name__ in _PLAIN_GRPO for kind in type(callback).__mro__
    )
