"""Checkpoints on disk: sealed by a checksum when written, checked before they are read, found again by their step."""

from __future__ import annotations

import hashlib
import logging
import os
import pickle
import re
import shutil
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import torch

from datamodules.errors import UserError

SEAL = ".sha256"
"""Ending of the file beside a checkpoint that holds its checksums, as `sha256sum --check` reads them."""

OnDamage = Literal["previous", "stop"]

_STEP = re.compile(r"step_(\d+)\.ckpt")

logger = logging.getLogger(__name__)


class DamagedCheckpointError(UserError):
    """A checkpoint that is not what was written."""


def seal(path: Path) -> None:
    """Writes the checksums of a checkpoint, a file or a folder of files, beside it: whole, or not at all."""
    lines = [f"{_digest(file)}  {file.relative_to(path.parent)}\n" for file in _files(path)]
    temporary = path.with_name(f".{path.name}{SEAL}.tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.writelines(lines)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, seal_of(path))
    flush(path.parent)


def seal_of(path: Path) -> Path:
    """The file that holds the checksums of a checkpoint."""
    return path.with_name(path.name + SEAL)


def remove(path: Path) -> None:
    """Deletes a checkpoint and its checksums; one that is not there is passed over."""
    seal_of(path).unlink(missing_ok=True)
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def flush(path: Path) -> None:
    """Makes a file, or the names in a folder, outlast a power failure."""
    opened = os.open(path, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)


def check(path: Path) -> None:
    """Compares a checkpoint with its checksums; without any (it was copied alone), with those inside its archive.

    Raises:
        DamagedCheckpointError: bytes are missing, added or changed.
        UserError: there is no such checkpoint.
    """
    path = path.resolve()
    if not path.exists():
        raise UserError(
            f"--ckpt_path {path}: no such file; expected a checkpoint, e.g. runs/NAME/version_0/checkpoints/last.ckpt"
        )
    if seal_of(path).is_file():
        _check_seal(path)
    elif path.is_file():
        _check_archive(path)


def read(path: Path) -> dict[str, Any]:
    """The content of a checked checkpoint file, its tensors mapped, not loaded. Nothing in it is run.

    Raises:
        DamagedCheckpointError: it is not what was written.
        UserError: it is no checkpoint of a run, or holds objects that could only be unpickled.
    """
    check(path)
    refused = f"--ckpt_path {path}: refused, since it holds more than tensors and plain values"
    try:
        state = torch.load(path.resolve(), map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        raise UserError(f"{refused} ({_culprit(error)}); expected a checkpoint that dots wrote") from error
    except (RuntimeError, ValueError, EOFError, OSError, KeyError, AttributeError, TypeError) as error:
        raise UserError(f"--ckpt_path {path}: cannot be read as a checkpoint ({_line(error)})") from error
    if not isinstance(state, dict) or not isinstance(state.get("state_dict"), dict):
        raise UserError(f"--ckpt_path {path}: holds no state_dict; expected a checkpoint of a run, not weights alone")
    return state


def newest_whole(folder: Path, on_damage: OnDamage = "previous") -> Path:
    """The newest checkpoint of a folder that is what was written; a newer one that is not is reported.

    Args:
        folder: of one run.
        on_damage: "previous" takes the one before a damaged checkpoint, "stop" none.

    Raises:
        DamagedCheckpointError: there is none, or a damaged one is newer and `on_damage` is "stop".
    """
    damaged = ""
    for path in by_age(folder):
        try:
            check(path)
        except DamagedCheckpointError as error:
            damaged = damaged or str(error)
            if on_damage == "stop":
                raise
            logger.warning("%s: the one before it is taken", error)
            continue
        return path
    raise DamagedCheckpointError(f"{damaged}; no other checkpoint in {folder} is whole: start a new run")


def by_age(folder: Path) -> list[Path]:
    """The checkpoints of a run, newest first."""
    found = [(int(match[1]), path) for path in folder.glob("step_*.ckpt") if (match := _STEP.fullmatch(path.name))]
    return [path for _, path in sorted(found, reverse=True)]


def _check_seal(path: Path) -> None:
    promised: dict[str, str] = {}
    for line in seal_of(path).read_text(encoding="utf-8", errors="replace").splitlines():
        digest, _, name = line.partition("  ")
        promised[name] = digest
    there = {str(file.relative_to(path.parent)): file for file in _files(path)}
    if missing := sorted(promised.keys() - there.keys()):
        raise DamagedCheckpointError(f"checkpoint {path} is damaged: {missing[0]} is missing")
    for name, file in there.items():
        if _digest(file) != promised.get(name):
            raise DamagedCheckpointError(
                f"checkpoint {path} is damaged: {name} ({file.stat().st_size} bytes) differs from its checksum in "
                f"{seal_of(path).name}"
            )


def _check_archive(path: Path) -> None:
    try:
        with zipfile.ZipFile(path) as archive:
            broken = archive.testzip()
    except (zipfile.BadZipFile, zlib.error, OSError, RuntimeError) as error:
        raise DamagedCheckpointError(
            f"checkpoint {path} is damaged, or none: {_line(error)}; expected the file that a run wrote"
        ) from error
    if broken is not None:
        raise DamagedCheckpointError(f"checkpoint {path} is damaged: {broken} in it differs from its checksum")


def _files(path: Path) -> Iterator[Path]:
    yield from sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]


def _digest(file: Path) -> str:
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def _culprit(error: pickle.UnpicklingError) -> str:
    """What the file asked for, out of torch's advice to load it all the same."""
    found = re.search(r"(?:GLOBAL|global|class|function) ([\w.]+\.[\w.]+)", str(error))
    return found[1] if found else "a pickle"


def _line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
