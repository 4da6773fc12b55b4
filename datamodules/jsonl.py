"""JSON Lines files, and JSON text that preserves tuples and non-string keys."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from datamodules.errors import UserError, nearest

_TUPLE, _ITEMS = "__tuple__", "__items__"


def read_objects(path: Path, keys: Sequence[str] = ()) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the objects of a JSON Lines file, each with its place for error messages: `'FILE' line 3`.

    Blank lines are skipped.

    Args:
        path: the file.
        keys: keys that every object must have.

    Raises:
        UserError: the file cannot be read, or a line is not an object or lacks a key.
    """
    try:
        with path.open("rb") as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    where = f"{str(path)!r} line {number}"
                    yield where, _parse_object(line, where, keys)
    except OSError as error:
        raise UserError(f"{str(path)!r} cannot be read ({error.strerror}). Give a readable JSONL file.") from error


def _parse_object(line: bytes, where: str, keys: Sequence[str]) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except ValueError as error:
        reason = error.msg if isinstance(error, json.JSONDecodeError) else str(error)
        raise UserError(f"{where}: {reason}. Write one JSON object per line.") from error
    except RecursionError as error:
        raise UserError(f"{where} is nested too deeply. Write one JSON object per line.") from error
    if not isinstance(row, dict):
        start = line.strip()[:40].decode(errors="replace")
        raise UserError(f"{where}: {start!r} is not an object. Write one JSON object per line.")
    for key in keys:
        if key not in row:
            hint = nearest(key, row) if row else "the object is empty"
            raise UserError(f"{where} has no {key!r}, which every object needs: {hint}")
    return row


def dumps(value: object) -> str:
    """Return JSON text from which `loads` restores the value, tuples and non-string keys included.

    Raises:
        TypeError: JSON cannot express the value (bytes, dates, sets); the message names the type.
    """
    return json.dumps(_tagged(value), ensure_ascii=False)


def loads(text: str) -> Any:
    """Return the value of JSON text, whether written by `dumps` or by any other writer."""
    return json.loads(text, object_hook=_untagged)


def _tagged(value: object) -> object:
    if isinstance(value, np.ndarray | np.generic):
        return _tagged(value.tolist())
    if isinstance(value, tuple):
        return {_TUPLE: [_tagged(item) for item in value]}
    if isinstance(value, list):
        return [_tagged(item) for item in value]
    if not isinstance(value, Mapping):
        return value
    if all(isinstance(key, str) for key in value):
        return {key: _tagged(item) for key, item in value.items()}
    return {_ITEMS: [[_tagged(key), _tagged(item)] for key, item in value.items()]}


def _untagged(found: dict[str, Any]) -> object:
    if found.keys() == {_TUPLE}:
        return tuple(found[_TUPLE])
    if found.keys() == {_ITEMS}:
        return dict(found[_ITEMS])
    return found
