"""The folder of a run: decided once at its start, whatever the loggers, and found again by `--ckpt_path last`."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from lightning.pytorch import Trainer
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger

from app.runs.checkpoint_files import OnDamage, by_age, newest_whole
from app.runs.lightning_internals import forget_files, logger_folder, write_to
from app.runs.ownership import Claim, Owner, new_id
from app.runs.record import RunRecord
from app.runs.summary import SUMMARY
from datamodules.errors import UserError

LAST = "last.ckpt"
CHECKPOINTS = "checkpoints"
SERVER_LOG = "server.log"
_VERSION = re.compile(r"version_(\d+)")
_MOST_NAMED = 5


@dataclass(frozen=True, slots=True)
class Runs:
    """The place of the runs of one name.

    Attributes:
        root: holds a folder `version_N` for each of them.
        version: the folder in `root` that the logger names; None for the next, or the newest.
    """

    root: Path
    version: str | None = None

    @classmethod
    def of(cls, trainer: Trainer) -> Runs:
        """Return `SAVE_DIR/NAME` of the first logger; without one, `DEFAULT_ROOT_DIR/lightning_logs`."""
        logs = trainer.loggers and not trainer.fast_dev_run  # type: ignore[attr-defined]  # set by a connector
        save_dir, name, version = logger_folder(trainer.loggers[0]) if logs else (None, None, None)
        root = os.path.join(save_dir or trainer.default_root_dir, "lightning_logs" if name is None else name)
        return cls(_expanded(root), version)

    def versions(self) -> list[tuple[int, Path]]:
        """Return numbers and folders, newest first."""
        found = [(int(match[1]), one) for one in self.root.glob("version_*") if (match := _VERSION.fullmatch(one.name))]
        return sorted(found, reverse=True)

    def claim_next(self, owner: Owner) -> Claim:
        """Create and claim the next folder; of several processes at once each gets its own."""
        number = max((number for number, _ in self.versions()), default=-1) + 1
        made = [each for each in (self.root, *self.root.parents) if not each.exists()]
        while True:
            self.root.mkdir(parents=True, exist_ok=True)
            path = self.root / f"version_{number}"
            try:
                path.mkdir()
            except FileExistsError:
                number += 1
                continue
            return Claim(path, owner, made=[path, *made])


def _expanded(path: str) -> Path:
    """Return a path with its `~` and environment variables replaced. Raises UserError for those that don't exist."""
    expanded = os.path.expanduser(os.path.expandvars(path))
    if unset := re.search(r"\$(\w+|\{\w+\})", expanded):
        raise UserError(f"The folder of the runs, {path!r}, names the variable {unset[0]}, which is not set. Set it.")
    if expanded.startswith("~"):
        raise UserError(f"The folder of the runs, {path!r}, names the home of a user who does not exist. Correct it.")
    return Path(expanded)


@dataclass(frozen=True, slots=True)
class LastRun:
    """What `--ckpt_path last` means.

    Attributes:
        folder: of the run that continues; None if there is none, or if it can't continue in its folder.
        checkpoint: its newest intact checkpoint; None to start over.
        said: what the rule found, for the user.
        then: what a training does, if it does not continue.
    """

    folder: Path | None
    checkpoint: Path | None
    said: str
    then: str = ""


def find_last(runs: Runs, on_damage: OnDamage = "previous", named: Path | None = None) -> LastRun:
    """Return the run that `--ckpt_path last` continues.

    This is the run whose own config.yaml was given (`named`), else the one whose version the logger names, else the
    newest version that was trained. A run that was stopped before its first checkpoint is started over.

    Raises:
        DamagedCheckpointError: the run has checkpoints, but no intact one, or the newest is damaged and `on_damage` is
            "stop".
    """
    if named is not None:
        candidates = [named]
    elif runs.version is not None:
        candidates = [runs.root / runs.version]
    else:
        candidates = [path for _, path in runs.versions()]
    passed: list[str] = []
    for folder in candidates:
        owner, saved = Owner.of(folder), checkpoint_folders(folder)
        if saved:
            checkpoint = newest_whole(saved, on_damage)
            return LastRun(folder, checkpoint, f"{folder}, from {checkpoint}{_passed_over(passed)}")
        if owner is not None and owner.command == "fit":
            ended = runs.version is None and named is None and (folder / SUMMARY).exists()
            how = "ended without a checkpoint" if ended else "was stopped before its first checkpoint"
            then = ": starting over as a new run" if ended else ": starting it over"
            return LastRun(None if ended else folder, None, f"{folder} {how}{_passed_over(passed)}", then)
        if folder.exists():
            passed.append(f"{folder.name} ({'no run' if owner is None else f'of dots {owner.command}'})")
    where = candidates[0] if len(candidates) == 1 and not passed else runs.root
    return LastRun(None, None, f"no run under {where} yet{_passed_over(passed)}", ", starting a new one")


def is_run(folder: Path) -> bool:
    """Return whether a training run has left its files in a folder."""
    owner = Owner.of(folder)
    return bool(checkpoint_folders(folder)) or (owner is not None and owner.command == "fit")


def checkpoint_of(path: Path) -> Path:
    """Return the newest intact checkpoint of a run folder; what is none, such as a checkpoint, is returned as it is."""
    saved = checkpoint_folders(path) if path.is_dir() else []
    return newest_whole(saved, "previous") if saved else path


def checkpoint_folders(run: Path) -> list[Path]:
    """Return the folders that hold checkpoints of the run in this folder."""
    owner = Owner.of(run)
    names = (CHECKPOINTS, *(() if owner is None else owner.checkpoints))
    folders = [run / name for name in dict.fromkeys(names)]
    return [one for one in folders if by_age(one) and (owner is None or owner_id(one) in (None, owner.id))]


def owner_id(folder: Path) -> str | None:
    """Return the id of the run to which a folder of checkpoints belongs; None where nothing says so."""
    owner = Owner.of(folder) or (Owner.of(folder.parent) if folder.name == CHECKPOINTS else None)
    return None if owner is None else owner.id


class RunTrainer(Trainer):
    """A trainer whose run owns a folder, to which all loggers and callbacks write."""

    run: Path | None = None
    """The folder of the run in progress; on ranks other than 0 known once the callbacks are set up."""
    continued: Path | None = None
    """The folder of an earlier run that this one continues; None for a folder of its own."""
    passes: int | None = None
    """Passes over the training prompts after which the run ends; None where only `max_steps` or a time ends it."""
    begun = False
    """Whether the run has got as far as its first completions; what fails before is a failed start."""

    @property
    def log_dir(self) -> str | None:
        """The folder of the run. Collective, as Lightning's."""
        if self.run is None:
            return super().log_dir
        found: str = self.strategy.broadcast(str(self.run))
        return found

    def limit_steps(self, most: int) -> None:
        """End the run after `most` optimizer steps, unless `max_steps` ends it before."""
        self.fit_loop.epoch_loop.max_steps = most if self.max_steps < 1 else min(most, self.max_steps)

    @contextmanager
    def own_folder(self, command: str) -> Iterator[Claim | None]:
        """Own a folder in the context, and print it at the end; on ranks other than 0 do nothing.

        A failed start leaves no trace but the log of a server.

        Raises:
            UserError: another process owns the folder, or it can't be written to.
        """
        if not self.is_global_zero:
            yield None
            return
        self.begun = False
        claim = self._claim(Owner(new_id(), command))
        self.run = claim.path
        given = self.loggers
        for logger in given:  # before Lightning lets them create their folders
            write_to(logger, claim.path, claim.owner.id)
        if command == "fit":
            self.loggers = [*given, RunRecord(claim.path)]
        try:
            yield claim
        except BaseException:
            if self.begun:
                print(f"run folder: {claim.path}", flush=True)
            holds = (claim.path / SERVER_LOG).exists() or bool(checkpoint_folders(claim.path))
            kept = self.begun or (claim.made and holds)  # in a folder of before these may be of before
            claim.release(forget=not kept)
            if not kept and claim.made:  # another call with this trainer starts from the beginning
                self.run = None
                for logger in self.loggers:
                    forget_files(logger)
            raise
        finally:
            self.loggers = given
        claim.release()
        print(f"run folder: {claim.path}", flush=True)  # after the progress bar's last frame
        self.continued = claim.path  # by another call with the same trainer

    def _claim(self, owner: Owner) -> Claim:
        runs = Runs.of(self)
        try:
            if self.continued is not None:
                return Claim(self.continued, owner)
            if runs.version is not None:
                return Claim(runs.root / runs.version, owner)
            return runs.claim_next(owner)
        except OSError as error:
            where = self.continued or runs.root
            raise UserError(
                f"The run's folder cannot be written in {where} ({error.strerror}), expected a writable folder. Make "
                "it writable, free disk space, or set save_dir of the first logger to another one."
            ) from error


def run_folder(trainer: Trainer) -> Path:
    """Return the folder of the trainer's run, correct on rank 0, the only one that writes.

    Without a run, as in `DotsTrainer.validate` from Python, it is the first logger's folder or the trainer's root.
    `trainer.log_dir` is not used because it broadcasts: it would hang when a single rank asks for it.
    """
    if isinstance(trainer, RunTrainer) and trainer.run is not None:
        return trainer.run
    logger = trainer.logger
    return Path(logger.log_dir if isinstance(logger, TensorBoardLogger | CSVLogger) else trainer.default_root_dir)


def _passed_over(names: list[str]) -> str:
    if not names:
        return ""
    more = f" and {len(names) - _MOST_NAMED} more" if len(names) > _MOST_NAMED else ""
    return f" (passed over: {', '.join(names[:_MOST_NAMED])}{more})"
