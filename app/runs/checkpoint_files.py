"""Checkpoints on disk: written with checksums, verified before they are read, and listed by step."""

from __future__ import annotations

import hashlib
import logging
import os
import pickle
import re
import shutil
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import torch

from datamodules.errors import UserError

SEAL = ".sha256"
"""Suffix of the file next to a checkpoint that holds its checksums in the format of `sha256sum --check`."""

OnDamage = Literal["previous", "stop"]

_STEP = re.compile(r"step_(\d+)\.ckpt")

logger = logging.getLogger(__name__)


class DamagedCheckpointError(UserError):
    """A checkpoint whose content differs from what was written."""


def seal(path: Path, digest: str | None = None) -> None:
    """Write the checksums of a checkpoint next to it. Atomic.

    Args:
        path: the checkpoint, a file or a folder of files.
        digest: the SHA-256 of a file, where it is known; by default the content is read.
    """
    lines = [f"{digest or _digest(file)}  {file.relative_to(path.parent)}\n" for file in _files(path)]
    temporary = path.with_name(f".{path.name}{SEAL}.tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.writelines(lines)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, seal_of(path))
    flush(path.parent)


def seal_of(path: Path) -> Path:
    """Return the path of a checkpoint's checksums."""
    return path.with_name(path.name + SEAL)


def remove(path: Path) -> None:
    """Delete a checkpoint and its checksums, if they exist."""
    seal_of(path).unlink(missing_ok=True)
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def flush(path: Path) -> None:
    """Flush a file, or the names in a folder, to disk, so that they survive a power failure."""
    opened = os.open(path, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)


def check(path: Path) -> None:
    """Verify a checkpoint by its checksums or, if it was copied without them, by those inside its archive.

    Raises DamagedCheckpointError if bytes differ, and UserError if there is no such checkpoint.
    """
    path = path.resolve()
    if not path.exists():
        raise UserError(
            f"--ckpt_path {path}: no such file. Expected a checkpoint, e.g. runs/NAME/version_0/checkpoints/last.ckpt"
        )
    if seal_of(path).is_file():
        _check_seal(path)
    elif path.is_file():
        try:
            with zipfile.ZipFile(path) as archive:
                broken = archive.testzip()
        except (zipfile.BadZipFile, zlib.error, OSError, RuntimeError) as error:
            raise DamagedCheckpointError(
                f"checkpoint {path} is damaged, or is not one: {_first_line(error)}. Expected a file that a run wrote"
            ) from error
        if broken is not None:
            raise DamagedCheckpointError(f"checkpoint {path} is damaged: {broken} in it differs from its checksum")


def read(path: Path) -> dict[str, Any]:
    """Verify a checkpoint file and return its content, with tensors memory-mapped. Runs no code from the file.

    Raises UserError if it is damaged, is not a checkpoint of a run, or holds objects that need unpickling.
    """
    check(path)
    try:
        state = torch.load(path.resolve(), map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        # torch's message advises unpickling the file; only the name of the object in it is of use here.
        found = re.search(r"(?:GLOBAL|global|class|function) ([\w.]+\.[\w.]+)", str(error))
        raise UserError(
            f"--ckpt_path {path}: refused, since it holds more than tensors and plain values "
            f"({found[1] if found else 'a pickle'}). Expected a checkpoint that dots wrote"
        ) from error
    except (RuntimeError, ValueError, EOFError, OSError, KeyError, AttributeError, TypeError) as error:
        raise UserError(f"--ckpt_path {path}: cannot be read as a checkpoint ({_first_line(error)})") from error
    if not isinstance(state, dict) or not isinstance(state.get("state_dict"), dict):
        raise UserError(f"--ckpt_path {path}: holds no state_dict. Expected the checkpoint of a run, not weights alone")
    return state


def newest_whole(folders: Sequence[Path], on_damage: OnDamage = "previous") -> Path:
    """Return the newest intact checkpoint of a run; log a warning about every damaged one that is newer.

    Args:
        folders: the folders that hold the checkpoints of the run.
        on_damage: "previous" falls back to the checkpoint before a damaged one, "stop" raises.

    Raises:
        DamagedCheckpointError: no checkpoint is intact, or the newest is damaged and `on_damage` is "stop".
    """
    damaged = ""
    for path in by_age(*folders):
        try:
            check(path)
        except DamagedCheckpointError as error:
            damaged = damaged or str(error)
            if on_damage == "stop":
                raise
            logger.warning("%s. The checkpoint before it is used", error)
            continue
        return path
    raise DamagedCheckpointError(f"{damaged}; no other checkpoint in {folders[0]} is intact. Start a new run")


def by_age(*folders: Path) -> list[Path]:
    """Return the checkpoints in a run's folders, newest first."""
    found = [path for folder in folders for path in folder.glob("step_*.ckpt") if _STEP.fullmatch(path.name)]
    return sorted(found, key=step_of, reverse=True)


def step_of(path: Path) -> int:
    """Return the number of steps after which a checkpoint was written; -1 if its name doesn't say."""
    match = _STEP.fullmatch(path.name)
    return -1 if match is None else int(match[1])


def _check_seal(path: Path) -> None:
    lines = seal_of(path).read_text(encoding="utf-8", errors="replace").splitlines()
    expected = {name: digest for digest, _, name in (line.partition("  ") for line in lines)}
    found = {str(file.relative_to(path.parent)): file for file in _files(path)}
    if missing := sorted(expected.keys() - found.keys()):
        raise DamagedCheckpointError(f"checkpoint {path} is damaged: {missing[0]} is missing")
    for name, file in found.items():
        if _digest(file) != expected.get(name):
            raise DamagedCheckpointError(
                f"checkpoint {path} is damaged: {name} ({file.stat().st_size} bytes) differs from its checksum in "
                f"{seal_of(path).name}"
            )


def _files(path: Path) -> Iterator[Path]:
    yield from sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]


def _digest(file: Path) -> str:
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
