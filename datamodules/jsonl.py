"""JSON Lines files, and JSON text that preserves tuples and non-string keys."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from datamodules.errors import UserError, nearest

MAX_LINE = 64 * 2**20
"""Bytes of the longest line that is read."""

MAX_DEPTH = 100
"""Levels of lists and objects within each other."""

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
                    yield where, parse_object(line, where, keys)
    except OSError as error:
        raise UserError(f"{str(path)!r} cannot be read ({error.strerror}). Give a readable JSONL file.") from error


def parse_object(line: bytes, where: str, keys: Sequence[str] = ()) -> dict[str, Any]:
    """Return the object in a line of a JSON Lines file.

    Args:
        line: UTF-8, with or without a byte order mark.
        where: place of the line, for messages.
        keys: keys that the object must have.

    Raises:
        UserError: the line is too long, is not UTF-8, is not an object, is nested too deeply, or lacks a key.
    """
    if len(line) > MAX_LINE:
        raise UserError(f"{where} has {len(line):,} bytes, but at most {MAX_LINE:,} are read. Shorten or remove it.")
    try:
        row = STRICT.decode(decoded(line, where))
    except json.JSONDecodeError as error:
        raise UserError(f"{where}: {error.msg}. Write one JSON object per line.") from error
    except ValueError as error:  # a repeated key, or an integer of thousands of digits
        raise UserError(f"{where}: {error}. Write one JSON object per line.") from error
    except RecursionError as error:
        raise _too_deep(where) from error
    if not isinstance(row, dict):
        start = line.strip()[:40].decode(errors="replace")
        raise UserError(f"{where}: {start!r} is not an object. Write one JSON object per line.")
    if line.count(b"[") + line.count(b"{") > MAX_DEPTH:
        check_depth(row, where)
    for key in keys:
        if key not in row:
            hint = nearest(key, row) if row else "the object is empty"
            raise UserError(f"{where} has no {key!r}, which every object needs: {hint}")
    return row


def without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return the object of these keys and values. Raises ValueError if a key is repeated: one value would be lost."""
    found = dict(pairs)
    if len(found) < len(pairs):
        key = next(key for place, (key, _) in enumerate(pairs) if key in dict(pairs[:place]))
        raise ValueError(f"the key {key!r} is given twice in one object, and one of its values would be lost")
    return found


STRICT = json.JSONDecoder(object_pairs_hook=without_repeats)
"""Reads JSON without repeated keys. Made once: `json.loads` with a hook would make one for every line."""


def decoded(content: bytes, where: str, *, is_file: bool = False) -> str:
    """Return text in UTF-8, without a byte order mark. Raises UserError; for a file it names the line."""
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        number, byte = content.count(b"\n", 0, error.start) + 1, f"byte 0x{content[error.start]:02X}"
        line = f" line {number}" if is_file else ""
        raise UserError(
            f"{where}{line} is not UTF-8 ({byte}: {error.reason}). Save the file as UTF-8, or set the encoding of its "
            "source if it is data (encoding: gbk)."
        ) from error


def check_depth(value: object, where: str) -> None:
    """Raise UserError if lists and objects are nested deeper than `MAX_DEPTH`, which logs and reward workers can't."""
    level, depth = [value], 0
    while level:
        nested = [one.values() if isinstance(one, dict) else one for one in level if isinstance(one, dict | list)]
        level, depth = [each for one in nested for each in one], depth + 1
        if depth > MAX_DEPTH:
            raise _too_deep(where)


def _too_deep(where: str) -> UserError:
    return UserError(f"{where} is nested too deeply (more than {MAX_DEPTH} levels). Flatten or remove it.")


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
