"""Opens the data behind a path or name: a file, a saved data set, a folder of files, or a hub data set."""

from __future__ import annotations

import json
import re
from pathlib import Path

import datasets
import pyarrow as pa
from datasets.exceptions import DatasetsError

from datamodules.errors import UserError, nearest
from datamodules.jsonl import read_objects
from datamodules.prompts.schemas import ANSWERS, PROMPTS

LOADERS = {".jsonl": "json", ".ndjson": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv"}
"""Supported file extensions, and the loader of `datasets` for each."""

_FAILURES = (DatasetsError, pa.ArrowException, OSError, ValueError, StopIteration, RuntimeError)
"""Exceptions of `datasets` for unreadable data. StopIteration: a file without rows; RuntimeError: a data set that is a
script, which is never run."""


def open_dataset(path: str, name: str | None, split: str, text_columns: list[str]) -> datasets.Dataset:
    """Open one split; a single file is that split, whatever its name.

    Args:
        path: file, folder or hub name.
        name: configuration of a hub data set.
        split: split of a hub data set or folder.
        text_columns: columns of a CSV file that stay text, in addition to the known prompt and answer columns.

    Raises:
        UserError: the data does not exist or cannot be read.
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
        raise UserError(
            f"{path!r} is neither a local file or folder nor a readable hub data set: {_root_cause(error)}"
        ) from error


def _open_file(path: Path, split: str, text_columns: list[str]) -> datasets.Dataset:
    if path.suffix not in LOADERS:
        raise UserError(f"{str(path)!r} ends in {path.suffix!r}, expected one of {', '.join(LOADERS)}. Convert it.")
    loader = LOADERS[path.suffix]
    options: dict[str, object] = {}
    if loader == "csv":  # keeps the spelling of answers such as 007, 1.50 and NA
        options = {"converters": dict.fromkeys([*PROMPTS, *ANSWERS, *text_columns], str), "keep_default_na": False}
    base_split = re.split(r"[\[+]", split)[0]  # `train` of `train[:10%]`
    try:
        dataset = datasets.load_dataset(loader, data_files={base_split: str(path)}, split=split, **options)
    except _FAILURES as error:
        if path.stat().st_size == 0:
            raise UserError(f"{str(path)!r} is empty. Give a file of rows with a prompt column.") from error
        if loader == "json":
            _check_json(path)
        raise UserError(f"{str(path)!r} cannot be read as {path.suffix[1:]}: {_root_cause(error)}") from error
    features = dataset.features
    answers = {column.split(".")[0] for column in (*ANSWERS, *text_columns)} & features.keys()
    numbers = {name for name in answers if re.match("Json|.*float", str(features[name]))}
    dates = any("timestamp" in str(feature) for feature in features.values())
    if loader != "json" or not (numbers or dates):
        return dataset
    # Arrow converts a column in which every text looks like a date, and integers to floats where both occur. Read the
    # file again to keep what it says.
    rows = json.loads(path.read_bytes()) if _is_array(path) else [row for _, row in read_objects(path)]
    mixed = {
        name
        for name in numbers
        if str(features[name]).startswith("Json") or any(_has_integer(row.get(name)) for row in rows)
    }
    if not (mixed or dates):
        return dataset
    if mixed:
        rows = [row | {name: json.dumps(row.get(name)) for name in mixed} for row in rows]
    texts = datasets.Dataset.from_list(rows, on_mixed_types="use_json")
    if mixed:
        texts = texts.cast(datasets.Features(texts.features | dict.fromkeys(mixed, datasets.Json())))
    return texts if split == base_split else texts.select(range(len(dataset)))


def _has_integer(value: object) -> bool:
    if isinstance(value, list | dict):
        return any(map(_has_integer, value.values() if isinstance(value, dict) else value))
    return isinstance(value, int) and not isinstance(value, bool)


def _open_folder(path: Path, name: str | None, split: str) -> datasets.Dataset:
    saved = (path / "dataset_dict.json").is_file() or (path / "state.json").is_file()
    try:
        found = datasets.load_from_disk(str(path)) if saved else datasets.load_dataset(str(path), name, split=split)
    except _FAILURES as error:
        raise UserError(f"Folder {str(path)!r} cannot be read as a data set: {_root_cause(error)}") from error
    if isinstance(found, datasets.Dataset):
        return found
    if split not in found:
        raise UserError(f"{str(path)!r} has no split {split!r}: {nearest(split, found)}")
    return found[split]


def _root_cause(error: BaseException) -> str:
    """Return the first line of the exception at the start of the chain."""
    while error.__cause__ is not None:
        error = error.__cause__
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _nearby(path: Path) -> str:
    """Suggest names close to the first missing part of a path."""
    missing = path.absolute()
    while not missing.parent.is_dir():
        missing = missing.parent
    entries = sorted(entry.name for entry in missing.parent.iterdir() if entry.is_dir() or entry.suffix in LOADERS)
    if not entries:
        return f"{str(missing.parent)!r} has no data file ({', '.join(LOADERS)})"
    hint = nearest(missing.name, entries)
    more = f" and {len(entries) - 20} more" if hint.startswith("choose") and len(entries) > 20 else ""
    return f"in {str(missing.parent)!r}, {nearest(missing.name, entries[:20]) if more else hint}{more}"


def _check_json(path: Path) -> None:
    """Check that a file is a JSON array, or that each of its lines is a JSON object.

    Raises:
        UserError: it is neither; the message names the first bad line.
    """
    if _is_array(path):
        problem = ""
        try:
            json.loads(path.read_bytes())
        except json.JSONDecodeError as error:
            problem = f" line {error.lineno}: {error.msg}"
        except UnicodeDecodeError as error:
            line = error.object.count(b"\n", 0, error.start) + 1
            problem = f" line {line} is not {error.encoding}: {error.reason}"
        except RecursionError:
            problem = " is nested too deeply"
        if problem:
            raise UserError(f"{str(path)!r}{problem}. Write a list of objects.")
        if path.suffix == ".json":
            return
    for _ in read_objects(path):
        pass


def _is_array(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(1024).lstrip()[:1] == b"["
