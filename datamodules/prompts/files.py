"""Opens what a path or name stands for: a data file, a saved data set, a folder of files, a data set of the hub."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
from datasets.exceptions import DatasetsError

from datamodules.errors import UserError, nearest
from datamodules.jsonl import read_objects
from datamodules.prompts.schemas import ANSWERS, PROMPTS

LOADERS = {".jsonl": "json", ".ndjson": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv"}
"""File endings that are read, and the loader of `datasets` that reads them."""

_FAILURES = (DatasetsError, pa.ArrowException, OSError, ValueError, StopIteration, RuntimeError)
"""What `datasets` raises for data that it cannot read (StopIteration: a file without a single row; RuntimeError: a data
set that is a script, which is never run)."""


def open_dataset(path: str, name: str | None, split: str, text_columns: list[str]) -> datasets.Dataset:
    """The rows of one split.

    Args:
        path: file, folder or hub name.
        name: configuration of a hub data set.
        split: of a hub data set or folder; a single file is that split, whatever its name.
        text_columns: columns that a CSV file must not turn into numbers, beside the known prompt and answer columns.

    Raises UserError when there is no such thing or it cannot be read.
    """
    local = Path(path).expanduser()
    if local.is_file():
        return _open_file(local, split, text_columns)
    if local.is_dir():
        return _open_folder(local, name, split)
    if local.suffix in LOADERS or path.startswith((".", "/", "~")) or path.count("/") > 1:
        raise UserError(f"{path!r} does not exist: {_nearby(local)}")
    try:
        return datasets.load_dataset(path, name, split=split)
    except _FAILURES as error:
        raise UserError(f"{path!r} is no local file or folder, and as a hub data set: {_line(error)}") from error


def _open_file(path: Path, split: str, text_columns: list[str]) -> datasets.Dataset:
    if path.suffix not in LOADERS:
        raise UserError(f"{str(path)!r} ends in {path.suffix!r}: expected one of {', '.join(LOADERS)}")
    loader = LOADERS[path.suffix]
    options: dict[str, Any] = {}
    if loader == "csv":  # an answer stays as written: 007, 1.50 and NA are no numbers to be rewritten
        options = {"converters": dict.fromkeys([*PROMPTS, *ANSWERS, *text_columns], str), "keep_default_na": False}
    try:
        dataset = datasets.load_dataset(loader, data_files={_base(split): str(path)}, split=split, **options)
    except _FAILURES as error:
        if path.stat().st_size == 0:
            raise UserError(f"{str(path)!r} is empty: expected rows with a prompt column") from error
        if loader == "json":
            _raise_for_broken_line(path)
        raise UserError(f"{str(path)!r} cannot be read as {path.suffix[1:]}: {_line(error)}") from error
    if loader == "json" and any("timestamp" in str(feature) for feature in dataset.features.values()):
        # Arrow turns a column of texts that all look like dates into dates; the texts are what was asked for.
        rows = datasets.Dataset.from_list(list(_json_rows(path)), on_mixed_types="use_json")
        return rows if split == _base(split) else rows.select(range(len(dataset)))
    return dataset


def _open_folder(path: Path, name: str | None, split: str) -> datasets.Dataset:
    try:
        if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
            saved = datasets.load_from_disk(str(path))
            if isinstance(saved, datasets.Dataset):
                return saved
            if split not in saved:
                raise UserError(f"{str(path)!r} has no split {split!r}: {nearest(split, saved)}")
            return saved[split]
        return datasets.load_dataset(str(path), name, split=split)
    except UserError:
        raise
    except _FAILURES as error:
        raise UserError(f"folder {str(path)!r} cannot be read as a data set: {_line(error)}") from error


def _base(split: str) -> str:
    """`train` of `train[:10%]`."""
    return re.split(r"[\[+]", split)[0]


def _line(error: BaseException) -> str:
    """The first line of what went wrong, at its root."""
    while error.__cause__ is not None:
        error = error.__cause__
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _nearby(path: Path) -> str:
    """Names near the first part of a path that is missing."""
    missing = path.absolute()
    while not missing.parent.is_dir():
        missing = missing.parent
    entries = sorted(entry.name for entry in missing.parent.iterdir() if entry.is_dir() or entry.suffix in LOADERS)
    if not entries:
        return f"{str(missing.parent)!r} holds no data file ({', '.join(LOADERS)})"
    hint = nearest(missing.name, entries)
    more = f" and {len(entries) - 20} more" if hint.startswith("choose") and len(entries) > 20 else ""
    return f"in {str(missing.parent)!r}, {nearest(missing.name, entries[:20]) if more else hint}{more}"


def _raise_for_broken_line(path: Path) -> None:
    """Raises UserError naming the first line that is not an object; returns when every line is one."""
    whole = _json_array_error(path)
    if whole is not None:
        raise UserError(f"{str(path)!r}{whole}; expected a list of objects")
    if path.suffix == ".json" and _starts_with(path) == b"[":
        return
    for _ in read_objects(path):
        pass


def _json_array_error(path: Path) -> str | None:
    """Where and why a file that begins as an array is no JSON; None when it is, or begins otherwise."""
    if _starts_with(path) != b"[":
        return None
    try:
        json.loads(path.read_bytes())
    except json.JSONDecodeError as error:
        return f" line {error.lineno}: {error.msg}"
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        return f" line {line} is not {error.encoding}: {error.reason}"
    except RecursionError:
        return " is nested too deeply"
    return None


def _json_rows(path: Path) -> Iterator[dict[str, Any]]:
    if _starts_with(path) == b"[":
        yield from json.loads(path.read_bytes())
        return
    yield from (row for _, row in read_objects(path))


def _starts_with(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(1024).lstrip()[:1]
