"""Checkpoints of complete steps, written atomically."""

from __future__ import annotations

import contextlib
import math
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from app.module import GRPOModule
from app.runs.background import Background
from app.runs.checkpoint_files import DamagedCheckpointError, by_age, flush, remove, seal, seal_of, step_of
from app.runs.checkpoint_files import check as check_files
from app.runs.checkpoint_io import StreamedCheckpoints
from app.runs.folder import CHECKPOINTS, LAST, RunTrainer, owner_id, run_folder
from app.runs.ownership import Claim
from callbacks.stages import Stage, StepCallback
from datamodules.errors import UserError, nearest
from datamodules.online import OnlinePromptDataModule
from datamodules.types import TrainBatch

BEST = "best.ckpt"
"""Link to the checkpoint with the best validation."""


class RunCheckpoint(StepCallback, Checkpoint):
    """Saves every `every` steps, after the step in which the run ends or is stopped, whatever stops it, and when an
    update is not finite.

    A checkpoint is written under a temporary name, flushed to disk and renamed; its SHA-256 is stored next to it. It is
    written when the step has updated all state, including the validation due after it, so that a resumed run continues
    as if it had never stopped. A folder holds the checkpoints of one run: that of another run is refused. Several of
    these callbacks, each with a folder of its own, keep checkpoints independently.

    Args:
        every: steps between two checkpoints.
        keep: number of newest checkpoints to keep.
        keep_best: metric of validation such as `val/accuracy` or `val/gsm8k/accuracy`: the checkpoint with its highest
            value so far is kept too, and `best.ckpt` links to it. A step whose validation is the best is saved even
            when it is not due.
        dirpath: folder of the checkpoints; null for `checkpoints/` in the run's folder.
        on_write_error: what to do when a checkpoint cannot be written (disk full, folder gone): "continue" warns and
            trains until the next one is due, "stop" ends the run. Older checkpoints are kept. A failure always ends the
            run if the checkpoint is its last or the run has several processes.
        background: copy the state to host memory and write it while the next steps train, so that a step is held for
            the copy only. The copy needs as much host memory as the checkpoint. The next checkpoint and the end of the
            run wait for it, and a run that is killed before it is written resumes from the one before.
    """

    stage = Stage.SAVE

    def __init__(
        self,
        every: int = 10,
        keep: int = 2,
        keep_best: str | None = None,
        dirpath: str | None = None,
        on_write_error: Literal["continue", "stop"] = "continue",
        background: bool = False,
    ) -> None:
        if every < 1 or keep < 1:
            raise UserError(f"RunCheckpoint has every={every} and keep={keep}, expected at least 1 each. Raise them.")
        self.every = every
        self.keep, self.keep_best = keep, keep_best
        self._best: tuple[float, int] | None = None
        """Highest value of `keep_best` after a step, and the number of steps."""
        self.dirpath = dirpath
        self.on_write_error = on_write_error
        self._background = Background() if background else None
        self._writing: Path | None = None
        """The checkpoint that is written in the background."""
        self.seconds = 0.0
        self._due: int | None = None
        self._step = 0
        self._saved = 0

    def check(self, trainer: Trainer, module: GRPOModule, datamodule: OnlinePromptDataModule) -> None:
        if self.keep_best is not None and not datamodule.measured("val") and not datamodule.val_size:
            raise UserError(
                f"checkpoint.keep_best is {self.keep_best}, but the run has no validation prompts. Set data.val or "
                "data.val_size."
            )
        if trainer.is_global_zero and self.dirpath:
            _check_writable(Path(self.dirpath))

    @contextlib.contextmanager
    def own_folder(self, trainer: RunTrainer, run: Claim, resumed: Path | None) -> Iterator[None]:
        """Own the folder of the checkpoints in the context, which is the run's own unless `dirpath` is set.

        Args:
            trainer: the trainer of the run.
            run: the run's claim to its folder.
            resumed: the checkpoint that the run resumes from.

        Raises:
            UserError: the folder has checkpoints of another run, or later ones than the run resumes from.
        """
        folder = self.folder(trainer)
        self._check_owner(folder, run, resumed, continues=trainer.continued is not None)
        if not self.dirpath:
            yield
            return
        claim = Claim(folder, replace(run.owner, checkpoints=()), take_over=True)
        try:
            run.add_checkpoints(folder)
            yield
        except BaseException:
            claim.release(forget=not trainer.begun and not by_age(folder))
            raise
        claim.release()

    def _check_owner(self, folder: Path, run: Claim, resumed: Path | None, *, continues: bool) -> None:
        saved = by_age(folder)
        if not saved:
            return
        option = "callbacks.RunCheckpoint.dirpath" if self.dirpath else "the version of the first logger"
        here = owner_id(folder)
        ours = continues and here == run.owner.id
        if resumed is not None:
            resumed = resumed.resolve()
            ours = ours or resumed.parent == folder.resolve() or (here is not None and here == owner_id(resumed.parent))
        if not ours:
            raise UserError(
                f"{folder} has checkpoints of another run ({saved[0].name}), which this run would mix with its own. "
                f"Resume that run with --ckpt_path {saved[0]}, or set {option} to another folder."
            )
        later = [one for one in saved if resumed is not None and step_of(one) > step_of(resumed) >= 0 and _intact(one)]
        if later:
            raise UserError(
                f"{folder} has {later[0].name}, which is later than the checkpoint that is resumed ({resumed}) and "
                f"would be mixed with what follows. Resume from {later[0].name}, or set {option} to another folder."
            )

    def on_train_start(self, trainer: Trainer, pl_module: GRPOModule) -> None:
        self._saved = self._step = trainer.fit_loop.epoch_loop.total_batch_idx + 1
        if trainer.is_global_zero:
            for part in self.folder(trainer).glob(".*.tmp"):  # of an earlier start that was killed while it wrote
                remove(part)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: GRPOModule, outputs: object, batch: TrainBatch, batch_idx: int
    ) -> None:
        self._step = batch.step + 1
        self._due = self._step if self._step % self.every == 0 or pl_module.diverged else None
        if pl_module.diverged or not validation_follows(trainer, batch_idx):
            self._save(trainer, pl_module)

    def on_validation_end(self, trainer: Trainer, pl_module: GRPOModule) -> None:
        if trainer.state.fn != "fit":
            return
        if self.keep_best is not None and self._is_best(self.keep_best, pl_module.last_measured):
            self._due = self._step
        self._save(trainer, pl_module)

    def _is_best(self, name: str, measured: Mapping[str, float]) -> bool:
        """Return whether a validation has the highest value so far; not that of the initial policy."""
        if name not in measured and self._best is None and self._step == 0:
            raise UserError(
                f"checkpoint.keep_best is {name}, which no validation of this run measures: {nearest(name, measured)}"
            )
        value = measured.get(name, math.nan)
        if not self._step or math.isnan(value) or (self._best is not None and value <= self._best[0]):
            return False
        self._best = value, self._step
        return True

    @property
    def state_key(self) -> str:
        return self._generate_state_key(dirpath=self.dirpath)

    def state_dict(self) -> dict[str, Any]:
        return {} if self._best is None else {"best": list(self._best)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        value, step = state_dict["best"]
        self._best = value, step

    def on_train_end(self, trainer: Trainer, pl_module: GRPOModule) -> None:
        if not pl_module.diverged:
            self._save(trainer, pl_module, ends=True)  # what stopped it came after the hooks of its last step
        self._wait(trainer, ends=True)

    def on_exception(self, trainer: Trainer, pl_module: GRPOModule, exception: BaseException) -> None:
        try:
            self._wait(trainer, ends=True)
        except UserError as error:  # must not hide what ended the run
            rank_zero_warn(str(error))

    def _save(self, trainer: Trainer, pl_module: GRPOModule, *, ends: bool = False) -> None:
        ends = ends or is_over(trainer) or trainer.received_sigterm or pl_module.diverged
        if ends and self._step > self._saved:
            self._due = self._step
        if self._due is None:
            return
        pl_module.ranks.barrier("checkpoint")
        started = time.perf_counter()
        self._wait(trainer)
        path = self.folder(trainer) / f"step_{self._due:08d}.ckpt"
        self._due, self._saved = None, self._step
        for logger in trainer.loggers:
            logger.save()  # what is logged up to a checkpoint survives a kill after it
        best = -1 if self._best is None else self._best[1]
        publish = partial(_publish, trainer, path, self.keep, best)
        try:
            if self._background is None:
                _write(trainer, path, None)
                publish()
            else:
                self._writing = path
                _write(trainer, path, self._background)
                self._background.submit(publish)
        except (OSError, RuntimeError) as error:
            self._failed(trainer, path, error, ends)
        if ends:
            self._wait(trainer, ends)
        self.seconds += time.perf_counter() - started

    def _wait(self, trainer: Trainer, ends: bool = False) -> None:
        """Wait for the checkpoint that is written in the background."""
        path, self._writing = self._writing, None
        if self._background is None or path is None:
            return
        try:
            self._background.wait()
        except (OSError, RuntimeError) as error:
            self._failed(trainer, path, error, ends)

    def _failed(self, trainer: Trainer, path: Path, error: OSError | RuntimeError, ends: bool) -> None:
        if isinstance(error, RuntimeError) and "PytorchStreamWriter" not in str(error):
            raise error
        with contextlib.suppress(OSError):
            remove(_temporary(path))  # frees the space for the next checkpoint
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        message = f"Checkpoint {path} cannot be written ({reason}); older checkpoints are intact."
        remedy = "Free disk space or set RunCheckpoint.dirpath to another folder"
        if ends or trainer.world_size > 1 or self.on_write_error == "stop":
            raise UserError(f"{message} {remedy}, then resume.") from error
        rank_zero_warn(f"{message} Training continues, and the next one is due in {self.every} steps. {remedy}.")

    def folder(self, trainer: Trainer) -> Path:
        """Return the folder of the checkpoints; correct on rank 0."""
        return Path(self.dirpath) if self.dirpath else run_folder(trainer) / CHECKPOINTS


def check_places(callbacks: Sequence[RunCheckpoint]) -> None:
    """Raise UserError if two of the callbacks write to one folder."""
    for number, one in enumerate(callbacks):
        if any(_place(one.dirpath) == _place(other.dirpath) for other in callbacks[:number]):
            raise UserError(
                f"Two callbacks.RunCheckpoint write to {one.dirpath or 'the folder of the run'}, but each needs a "
                "folder of its own. Set another dirpath, or list one of them."
            )


def _place(dirpath: str | None) -> Path | None:
    return None if dirpath is None else Path(dirpath).resolve()


def _intact(path: Path) -> bool:
    try:
        check_files(path)
    except DamagedCheckpointError:
        return False
    return True


def _temporary(path: Path) -> Path:
    return path.with_name(f".{path.name}.tmp")


def _write(trainer: Trainer, path: Path, background: Background | None) -> None:
    """Write a checkpoint under its temporary name, or start to."""
    temporary = _temporary(path)
    if trainer.is_global_zero:
        path.parent.mkdir(parents=True, exist_ok=True)
        remove(temporary)
    options = {} if background is None else {"storage_options": background}
    # False saves optimizer, loops and callbacks too; it says nothing about how the file is loaded.
    trainer.save_checkpoint(temporary, weights_only=False, **options)


def _publish(trainer: Trainer, path: Path, keep: int, best: int) -> None:
    """Give a written checkpoint its name, its checksums and the links, and remove those that are not kept any more.

    Args:
        trainer: its rank 0 does this.
        path: the checkpoint's name.
        keep: how many of the newest are kept.
        best: number of steps of the best checkpoint, which is kept too; -1 for none.
    """
    if not trainer.is_global_zero:
        return
    temporary, io = _temporary(path), trainer.strategy.checkpoint_io
    digest = io.digests.pop(temporary, None) if isinstance(io, StreamedCheckpoints) else None
    # A sharded checkpoint is a folder, to which every rank has written its shards.
    for file in [*temporary.glob("*"), temporary]:
        flush(file)
    seal_of(path).unlink(missing_ok=True)  # left by an earlier start of the run
    if path.is_dir():
        remove(path)
    os.replace(temporary, path)
    flush(path.parent)
    seal(path, digest)
    for name in (LAST, BEST) if step_of(path) == best else (LAST,):
        link = _temporary(path.with_name(name))
        link.unlink(missing_ok=True)
        link.symlink_to(path.name)
        os.replace(link, path.with_name(name))
    # Later ones are damaged: the run has resumed from one before them.
    earlier = [one for one in by_age(path.parent) if step_of(one) <= step_of(path)]
    for old in earlier[keep:]:
        if step_of(old) != best:
            remove(old)


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
    """Return whether the run ends as configured: all its steps or epochs are done, or a callback has stopped it."""
    stops = trainer.should_stop and trainer.global_step >= (trainer.min_steps or 0)
    last_epoch = trainer.is_last_batch and trainer.current_epoch + 1 >= (trainer.max_epochs or 0) > 0
    return trainer.global_step >= trainer.max_steps > 0 or stops or last_epoch


def can_validate(trainer: Trainer) -> bool:
    """Return whether the run has validation prompts, and validates on them."""
    return bool(trainer.enable_validation and any(trainer.num_val_batches))


def validation_follows(trainer: Trainer, batch_idx: int) -> bool:
    """Return whether a validation follows the step that is ending: at its interval, and when the run ends."""
    interval = trainer.val_check_batch
    due = is_over(trainer) or (isinstance(interval, int) and (batch_idx + 1) % interval == 0)
    return due and can_validate(trainer)
