"""Checkpoints of complete steps, written atomically."""

from __future__ import annotations

import contextlib
import os
import time
from pathlib import Path
from typing import Literal

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from app.module import GRPOModule
from app.runs.checkpoint_files import by_age, flush, remove, seal, seal_of
from app.runs.folder import LAST, run_folder
from callbacks.stages import Stage, StepCallback
from datamodules.errors import UserError
from datamodules.online import OnlinePromptDataModule
from datamodules.types import TrainBatch


class RunCheckpoint(StepCallback, Checkpoint):
    """Saves every `every` steps, after the last step, when an update is not finite, and at the end of the step in which
    Ctrl-C or SIGTERM arrives.

    A checkpoint is written under a temporary name, flushed to disk and renamed; its SHA-256 is stored next to it. It is
    written when the step has updated all state, including the validation due after it, so that a resumed run continues
    as if it had never stopped.

    Args:
        every: steps between two checkpoints.
        keep: number of newest checkpoints to keep.
        dirpath: folder of the checkpoints; null for `checkpoints/` in the run's folder.
        on_write_error: what to do when a checkpoint cannot be written (disk full, folder gone): "continue" warns and
            trains until the next one is due, "stop" ends the run. Older checkpoints are kept. A failure always ends the
            run if the checkpoint is its last or the run has several processes.
    """

    stage = Stage.SAVE

    def __init__(
        self,
        every: int = 10,
        keep: int = 2,
        dirpath: str | None = None,
        on_write_error: Literal["continue", "stop"] = "continue",
    ) -> None:
        if every < 1 or keep < 1:
            raise UserError(f"RunCheckpoint has every={every} and keep={keep}, expected at least 1 each. Raise them.")
        self.every = every
        self.keep = keep
        self.dirpath = dirpath
        self.on_write_error = on_write_error
        self.seconds = 0.0
        self._due: int | None = None
        self._is_last = False
        self._step = 0

    def check(self, trainer: Trainer, module: GRPOModule, datamodule: OnlinePromptDataModule) -> None:
        if trainer.is_global_zero:
            _check_writable(self._folder(trainer))

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: GRPOModule, outputs: object, batch: TrainBatch, batch_idx: int
    ) -> None:
        step = batch.step + 1
        last = is_over(trainer)
        if step % self.every == 0 or last or trainer.received_sigterm or pl_module.diverged:
            self._due, self._is_last = step, last or trainer.received_sigterm or pl_module.diverged
            if pl_module.diverged or not validation_follows(trainer, batch_idx):
                self._save(trainer, pl_module)
        self._step = step

    def on_validation_end(self, trainer: Trainer, pl_module: GRPOModule) -> None:
        if trainer.received_sigterm and self._step and self._due is None:
            self._due, self._is_last = self._step, True
        self._save(trainer, pl_module)

    def _save(self, trainer: Trainer, pl_module: GRPOModule) -> None:
        if self._due is None:
            return
        pl_module.ranks.barrier("checkpoint")
        started = time.perf_counter()
        path = self._folder(trainer) / f"step_{self._due:08d}.ckpt"
        self._due = None
        temporary = _temporary(path)
        try:
            _write(trainer, path, temporary)
            if trainer.is_global_zero:
                seal(path)
                link = _temporary(path.with_name(LAST))
                link.unlink(missing_ok=True)
                link.symlink_to(path.name)
                os.replace(link, path.with_name(LAST))
                for old in by_age(path.parent)[self.keep :]:
                    remove(old)
        except (OSError, RuntimeError) as error:
            if isinstance(error, RuntimeError) and "PytorchStreamWriter" not in str(error):
                raise
            with contextlib.suppress(OSError):
                remove(temporary)  # frees the space for the next checkpoint
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            message = f"Checkpoint {path} cannot be written ({reason}); older checkpoints are intact."
            remedy = "Free disk space or set RunCheckpoint.dirpath to another folder"
            if self._is_last or trainer.world_size > 1 or self.on_write_error == "stop":
                raise UserError(f"{message} {remedy}, then resume.") from error
            rank_zero_warn(f"{message} Training continues, and the next one is due in {self.every} steps. {remedy}.")
        self.seconds += time.perf_counter() - started

    def _folder(self, trainer: Trainer) -> Path:
        return Path(self.dirpath) if self.dirpath else run_folder(trainer) / "checkpoints"


def _temporary(path: Path) -> Path:
    return path.with_name(f".{path.name}.tmp")


def _write(trainer: Trainer, path: Path, temporary: Path) -> None:
    if trainer.is_global_zero:
        path.parent.mkdir(parents=True, exist_ok=True)
        remove(temporary)
    # False saves optimizer, loops and callbacks too; it says nothing about how the file is loaded.
    trainer.save_checkpoint(temporary, weights_only=False)
    if trainer.is_global_zero:
        # A sharded checkpoint is a folder, to which every rank has written its shards.
        for file in [*temporary.glob("*"), temporary]:
            flush(file)
        seal_of(path).unlink(missing_ok=True)  # left by an earlier start of the run
        if path.is_dir():
            remove(path)
        os.replace(temporary, path)
        flush(path.parent)


def _check_writable(folder: Path) -> None:
    """Create the folder and a file in it, then remove whatever did not exist before."""
    made = [each for each in (folder, *folder.parents) if not each.exists()]
    probe = folder / ".probe.tmp"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
        for each in made:
            each.rmdir()
    except OSError as error:
        raise UserError(
            f"Checkpoints cannot be written to {folder} ({error.strerror}), expected a writable folder. Make it "
            "writable or set RunCheckpoint.dirpath to another one."
        ) from error


def is_over(trainer: Trainer) -> bool:
    """Return whether the run ends as configured: all its steps are done, or a callback has stopped it."""
    return trainer.global_step >= trainer.max_steps > 0 or trainer.should_stop


def validation_follows(trainer: Trainer, batch_idx: int) -> bool:
    """Return whether a validation follows the step that is ending."""
    interval = trainer.val_check_batch
    return bool(trainer.enable_validation and isinstance(interval, int) and (batch_idx + 1) % interval == 0)
