"""Ownership of a folder: one process at a time writes to it, and a file in it names the run that it belongs to."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import uuid
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TextIO

from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from datamodules.errors import UserError

OWNER = "run.json"
_NO_LOCKS = frozenset({errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL})


@dataclass(frozen=True, slots=True)
class Owner:
    """Content of `run.json`.

    Attributes:
        id: of the run, drawn at its start and kept when it is resumed.
        command: the subcommand that made the folder: "fit" for a training run.
        checkpoints: the folders of the run's checkpoints, relative to its folder where they lie within it.
    """

    id: str
    command: str
    checkpoints: tuple[str, ...] = ()

    @classmethod
    def of(cls, folder: Path) -> Owner | None:
        """Return the owner of a folder; None if no run has claimed it, or the file is damaged."""
        try:
            content = json.loads((folder / OWNER).read_text(encoding="utf-8"))
            return cls(str(content["id"]), str(content["command"]), tuple(map(str, content["checkpoints"])))
        except (OSError, ValueError, KeyError, TypeError):
            return None


class Claim:
    """A folder that this process owns until `release`, at the latest until it dies, however it dies.

    Args:
        path: the folder; it is created if it does not exist.
        owner: the owner if the folder has none yet, or if `take_over`.
        take_over: replace an owner that has ended.
        made: folders that were created for the claim, innermost first; by default those that do not exist yet.

    Raises:
        UserError: another process owns the folder.
        OSError: the folder cannot be written to.
    """

    def __init__(
        self, path: Path, owner: Owner, *, take_over: bool = False, made: Sequence[Path] | None = None
    ) -> None:
        self.path = path
        made = [each for each in (path, *path.parents) if not each.exists()] if made is None else made
        # Absolute: the working folder may be another one when they are removed.
        self._folder, self._made = path.absolute(), [each.absolute() for each in made]
        path.mkdir(parents=True, exist_ok=True)
        try:
            self._file, self._before = _locked(path)
        except BaseException:
            self._remove_folders()
            raise
        known = Owner.of(path)
        try:
            self.owner = owner if known is None or take_over else replace(known, command=owner.command)
            if self.owner != known:
                self._write(_text(self.owner))
        except BaseException:
            self.release(forget=True)
            raise

    @property
    def made(self) -> bool:
        """Whether the folder was created by the claim."""
        return self._folder in self._made

    def add_checkpoints(self, folder: Path) -> None:
        """Record a folder of the run's checkpoints, where `--ckpt_path last` will look for them."""
        inside = folder.resolve().is_relative_to(self.path.resolve())
        name = os.path.relpath(folder, self.path) if inside else str(folder.resolve())
        if name not in self.owner.checkpoints:
            self.owner = replace(self.owner, checkpoints=(*self.owner.checkpoints, name))
            self._write(_text(self.owner))

    def release(self, *, forget: bool = False) -> None:
        """Let others own the folder. `forget` restores what was there before the claim: a new folder is removed."""
        if forget and self._before:
            self._write(self._before)
        elif forget:
            (self._folder / OWNER).unlink(missing_ok=True)
            if self.made:
                shutil.rmtree(self._folder, ignore_errors=True)
            self._remove_folders()
        self._file.close()

    def _write(self, text: str) -> None:
        self._file.seek(0)
        self._file.truncate()
        self._file.write(text)
        self._file.flush()

    def _remove_folders(self) -> None:
        for each in self._made:
            try:
                each.rmdir()
            except FileNotFoundError:
                continue
            except OSError:  # something else is in it
                return


def new_id() -> str:
    """Return an id that no other run has."""
    return uuid.uuid4().hex


def _text(owner: Owner) -> str:
    return json.dumps(asdict(owner), indent=1) + "\n"


def _locked(folder: Path) -> tuple[TextIO, str]:
    """Open and lock the owner's file; return it with its content."""
    while True:
        file = (folder / OWNER).open("a+", encoding="utf-8", errors="replace")
        try:
            # Not `lockf`: closing any other handle of the file, such as a reader's, would drop the lock.
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            raise UserError(
                f"{folder} belongs to a run that another process is writing to at this moment. Wait for its end or "
                "stop it, or start a run of another name."
            ) from None
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                file.close()
                raise
            rank_zero_warn(
                f"The file system of {folder} has no locks ({error.strerror}): do not start this run twice at once."
            )
            return file, _content(file)
        try:
            if os.path.samestat(os.fstat(file.fileno()), os.stat(folder / OWNER)):
                return file, _content(file)
        except FileNotFoundError:  # removed between opening and locking, by a run that was refused
            folder.mkdir(parents=True, exist_ok=True)
        file.close()


def _content(file: TextIO) -> str:
    file.seek(0)
    return file.read()
