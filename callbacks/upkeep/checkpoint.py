"""Checkpoints that hold a whole step, and are there whole or not at all."""

from __future__ import annotations

import contextlib
import os
import time
from pathlib import Path
from typing import Any, Literal

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
    """Saves every `every` steps, after the last step, when updates are no longer finite, and on Ctrl-C or SIGTERM at
    the end of the step in progress.

    A checkpoint is written next to its final name, flushed to the disk and renamed; its SHA-256 stands beside it. It is
    taken after all feedback of its step, and after the validation that follows it when one is due: a resumed run goes
    on as if never stopped.

    Args:
        every: steps between two checkpoints.
        keep: newest checkpoints kept.
        dirpath: folder; None is `checkpoints/` in the run's folder.
        on_write_error: when a checkpoint cannot be written (disk full, folder gone), "continue" says so and trains on
            until the next one is due, "stop" ends the run. The older checkpoints stay. The last checkpoint of a run,
            and any of several processes, always ends it.
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
            raise UserError(f"RunCheckpoint(every={every}, keep={keep}): expected both at least 1")
        self.every = every
        self.keep = keep
        self.dirpath = dirpath
        self.on_write_error = on_write_error
        self.seconds = 0.0
        self._due: int | None = None
        self._is_last = False
        self._step = 0

    def check(self, trainer: Trainer, module: GRPOModule, datamodule: OnlinePromptDataModule) -> None:
        # Now, not after the first interval.
        if trainer.is_global_zero:
            _try_to_write(self._folder(trainer))

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: GRPOModule, outputs: Any, batch: TrainBatch, batch_idx: int
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
        try:
            write_whole(trainer, path)
            if trainer.is_global_zero:
                self._publish(path)
        except (OSError, RuntimeError) as error:
            if isinstance(error, RuntimeError) and "PytorchStreamWriter" not in str(error):
                raise
            self._failed(path, error, must_stop=self._is_last or trainer.world_size > 1)
        self.seconds += time.perf_counter() - started

    def _folder(self, trainer: Trainer) -> Path:
        return Path(self.dirpath) if self.dirpath else run_folder(trainer) / "checkpoints"

    def _publish(self, path: Path) -> None:
        """Seals a checkpoint that is there, makes it the last, and drops the oldest."""
        seal(path)
        _point_at(path.with_name(LAST), path.name)
        for old in by_age(path.parent)[self.keep :]:
            remove(old)

    def _failed(self, path: Path, error: OSError | RuntimeError, must_stop: bool) -> None:
        """What remains of a checkpoint that could not be written goes, so that the next one finds its room."""
        with contextlib.suppress(OSError):
            remove(temporary_of(path))
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        said = f"checkpoint {path} cannot be written ({reason}); the older ones are as they were"
        if must_stop or self.on_write_error == "stop":
            raise UserError(
                f"{said}: free the disk or name another folder (RunCheckpoint.dirpath), and resume"
            ) from error
        rank_zero_warn(f"{said}, and training goes on: the next one is due in {self.every} steps")


def write_whole(trainer: Trainer, path: Path) -> None:
    """Saves a checkpoint under a temporary name in the same folder, flushes it, and renames it. Rank 0 writes."""
    temporary = temporary_of(path)
    if trainer.is_global_zero:
        path.parent.mkdir(parents=True, exist_ok=True)
        remove(temporary)
    # Lightning's flag for "not the weights alone": optimizer, loops and callbacks too. Loading stays weights_only.
    trainer.save_checkpoint(temporary, weights_only=False)
    if trainer.is_global_zero:
        # A sharded checkpoint is a folder; all processes have written their parts of it.
        for file in [*temporary.glob("*"), temporary]:
            flush(file)
        seal_of(path).unlink(missing_ok=True)  # of an earlier life of the run
        if path.is_dir():
            remove(path)
        os.replace(temporary, path)
        flush(path.parent)


def temporary_of(path: Path) -> Path:
    """The name of a checkpoint while it is written."""
    return path.with_name(f".{path.name}.tmp")


def _try_to_write(folder: Path) -> None:
    """Makes the folder and a file in it, and takes back what was not there before."""
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
            f"checkpoints cannot be written to {folder} ({error.strerror}): make it writable, or name another folder "
            "by RunCheckpoint.dirpath"
        ) from error


def _point_at(link: Path, name: str) -> None:
    temporary = link.with_name(f".{link.name}.tmp")
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(name)
    os.replace(temporary, link)


def is_over(trainer: Trainer) -> bool:
    """Whether the run ends as it was meant to: its steps are done, or a callback has asked for the end."""
    return trainer.global_step >= trainer.max_steps > 0 or trainer.should_stop


def validation_follows(trainer: Trainer, batch_idx: int) -> bool:
    """Whether the step that ends is validated before the next one begins."""
    interval = trainer.val_check_batch
    return bool(trainer.enable_validation and isinstance(interval, int) and (batch_idx + 1) % interval == 0)
