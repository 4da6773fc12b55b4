"""The measurements of each prompt on disk, so that a stopped selection can be resumed."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from app.subsets.base import Column
from datamodules.errors import UserError

_SETTINGS, _PROGRESS = "settings.json", "progress.json"


def claim_folder(folder: Path, settings: Mapping[str, Any], command: str = "dots select") -> None:
    """Create the folder of a command, which belongs to the settings that its measurements depend on.

    Raises:
        UserError: the folder holds measurements with other settings, or something else.
    """
    plain = json.loads(json.dumps(settings))
    path = folder / _SETTINGS
    if path.is_file():
        found = json.loads(path.read_text())
        if different := [name for name in sorted({*found, *plain}) if found.get(name) != plain.get(name)]:
            raise UserError(
                f"{folder} holds measurements made with another {', '.join(different)}. Repeat the original "
                "command, choose another --out, or delete the folder."
            )
    elif folder.exists() and any(folder.iterdir()):
        raise UserError(f"{folder} exists and was not written by `{command}`. Choose another --out.")
    else:
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(path, json.dumps(plain, indent=2) + "\n")


class Measurements:
    """Memory-mapped columns `NAME.npy` with one row per prompt, filled from the first prompt to the last.

    A row counts once it is flushed to the disk and included in `done`; later rows of a killed process are overwritten.
    """

    def __init__(self, folder: Path, columns: Mapping[str, Column], prompts: int) -> None:
        self._progress = folder / _PROGRESS
        self.done = json.loads(self._progress.read_text())["done"] if self._progress.is_file() else 0
        self.arrays = {
            name: _open(folder / f"{name}.npy", column.dtype, column.shape(prompts), fresh=self.done == 0)
            for name, column in columns.items()
        }

    def append(self, rows: Mapping[str, np.ndarray]) -> None:
        """Append the next prompts' rows, `[B]` or `[B, width]` each."""
        count = len(next(iter(rows.values())))
        for name, array in self.arrays.items():
            array[self.done : self.done + count] = rows[name]
            array.flush()
        self.done += count
        write_whole(self._progress, json.dumps({"done": self.done}) + "\n")


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield the path of a temporary file that replaces `path` at the end, if there was no error."""
    temporary = path.with_name(f".{path.name}.tmp")
    yield temporary
    os.replace(temporary, path)


def write_whole(path: Path, text: str) -> None:
    """Write a text file atomically."""
    with replacing(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _open(path: Path, dtype: str, shape: tuple[int, ...], *, fresh: bool) -> np.memmap:
    if fresh:
        return np.lib.format.open_memmap(path, mode="w+", dtype=np.dtype(dtype), shape=shape)
    array = np.lib.format.open_memmap(path, mode="r+")
    if array.shape != shape or array.dtype != np.dtype(dtype):
        found = f"{array.dtype} {array.shape}"
        raise UserError(f"{path} holds {found}, but {dtype} {shape} is expected. Delete its folder.")
    return array
