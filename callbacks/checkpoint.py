"""Checkpoints that hold a whole step, and are there whole or not at all."""

from __future__ import annotations

import os
import shutil
import time
from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Checkpoint

from app.module import GRPOModule
from app.run_folder import LAST, run_folder
from datamodules.errors import UserError
from datamodules.types import TrainBatch


class RunCheckpoint(Checkpoint):
    """Saves every `every` steps, after the last step, when updates are no longer finite, and on Ctrl-C or SIGTERM at
    the end of the step in progress.

    A checkpoint is written next to its final name, flushed to the disk and renamed. It is taken after all feedback of
    its step, and after the validation that follows it when one is due: a resumed run goes on as if never stopped.

    Args:
        every: steps between two checkpoints.
        keep: newest checkpoints kept.
        dirpath: folder; None is `checkpoints/` in the run's folder.
    """

    def __init__(self, every: int = 10, keep: int = 2, dirpath: str | None = None) -> None:
        if every < 1 or keep < 1:
            raise UserError(f"RunCheckpoint(every={every}, keep={keep}): expected both at least 1")
        self.every = every
        self.keep = keep
        self.dirpath = dirpath
        self.seconds = 0.0
        self._due: int | None = None

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: GRPOModule, outputs: Any, batch: TrainBatch, batch_idx: int
    ) -> None:
        step = batch.step + 1
        last = trainer.global_step >= trainer.max_steps > 0
        if step % self.every == 0 or last or trainer.received_sigterm or pl_module.diverged:
            self._due = step
            if pl_module.diverged or not _validation_follows(trainer, batch_idx):
                self._save(trainer, pl_module)

    def on_validation_end(self, trainer: Trainer, pl_module: GRPOModule) -> None:
        self._save(trainer, pl_module)

    def _save(self, trainer: Trainer, pl_module: GRPOModule) -> None:
        if self._due is None:
            return
        pl_module.ranks.meet("checkpoint")
        started = time.perf_counter()
        folder = Path(self.dirpath) if self.dirpath else run_folder(trainer) / "checkpoints"
        name = f"step_{self._due:08d}.ckpt"
        self._due = None
        write_whole(trainer, folder / name)
        if trainer.is_global_zero:
            _point_at(folder / LAST, name)
            for old in sorted(folder.glob("step_*.ckpt"))[: -self.keep]:
                remove(old)
        self.seconds += time.perf_counter() - started


def write_whole(trainer: Trainer, path: Path) -> None:
    """Saves a checkpoint under a temporary name in the same folder, flushes it, and renames it. Rank 0 writes."""
    temporary = path.with_name(f".{path.name}.tmp")
    if trainer.is_global_zero:
        path.parent.mkdir(parents=True, exist_ok=True)
        remove(temporary)
    # Lightning's flag for "not the weights alone": optimizer, loops and callbacks too. Loading stays weights_only.
    trainer.save_checkpoint(temporary, weights_only=False)
    if trainer.is_global_zero:
        # A sharded checkpoint is a folder; all processes have written their parts of it.
        for file in [*temporary.glob("*"), temporary]:
            _flush(file)
        if path.is_dir():
            remove(path)
        os.replace(temporary, path)
        _flush(path.parent)


def remove(checkpoint: Path) -> None:
    """Deletes a checkpoint, a file or a folder."""
    if checkpoint.is_dir():
        shutil.rmtree(checkpoint)
    else:
        checkpoint.unlink(missing_ok=True)


def _flush(path: Path) -> None:
    """To the disk; of a folder, the names in it."""
    opened = os.open(path, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)


def _point_at(link: Path, name: str) -> None:
    temporary = link.with_name(f".{link.name}.tmp")
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(name)
    os.replace(temporary, link)


def _validation_follows(trainer: Trainer, batch_idx: int) -> bool:
    interval = trainer.val_check_batch
    return bool(trainer.enable_validation and isinstance(interval, int) and (batch_idx + 1) % interval == 0)
