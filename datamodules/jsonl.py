"""JSON Lines: one object per line."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from datamodules.errors import UserError, nearest


def read_objects(path: Path, keys: Sequence[str] = ()) -> Iterator[tuple[str, dict[str, Any]]]:
    """The objects of a file, each with its place as errors name it: `'FILE' line 3`. Blank lines are passed over.

    Args:
        path: the file.
        keys: that every object must have.

    Raises:
        UserError: the file cannot be read, or a line is no object or lacks a key.
    """
    try:
        with path.open("rb") as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    where = f"{str(path)!r} line {number}"
                    yield where, _object(line, where, keys)
    except OSError as error:
        raise UserError(f"{str(path)!r} cannot be read ({error.strerror}): expected a JSONL file") from error


def _object(line: bytes, where: str, keys: Sequence[str]) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except ValueError as error:
        said = error.msg if isinstance(error, json.JSONDecodeError) else str(error)
        raise UserError(f"{where}: {said}; expected one JSON object per line") from error
    except RecursionError as error:
        raise UserError(f"{where} is nested too deeply; expected one JSON object per line") from error
    if not isinstance(row, dict):
        raise UserError(f"{where}: {line.strip()[:40].decode(errors='replace')!r} is no object; expected one per line")
    for key in keys:
        if key not in row:
            raise UserError(f"{where} has no {key!r}: of its keys, {nearest(key, row) if row else 'there are none'}")
    return row
