"""Opens the data behind a path or name: a file, a saved data set, a folder of files, or a hub data set.

A path is the name of one file, never a pattern. `datasets` reads paths as patterns and URLs, and caches files by their
name and time. It is therefore given names of hub data sets only, and local files are read here, without a cache.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Mapping, Sequence
from glob import glob
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory

import datasets
import pyarrow as pa
from datasets.exceptions import DatasetsError

from datamodules.errors import UserError, nearest
from datamodules.prompts.readers import READERS, FileOptions, ending_of
from datamodules.prompts.tables import DatasetTable, Table, ranges

_FAILURES = (DatasetsError, pa.ArrowException, OSError, ValueError, KeyError, StopIteration, RuntimeError)
"""Exceptions of `datasets` for unreadable data. RuntimeError: a data set that is a script, which is never run."""

_ENDINGS = ".jsonl, .ndjson, .json, .csv, .tsv (also with .gz, .bz2 or .xz), .parquet"


def open_table(path: str, name: str | None, split: str, options: FileOptions) -> Table:
    """Open one split; a single file is that split, whatever its name.

    Args:
        path: file, folder or hub name.
        name: configuration of a hub data set or folder.
        split: split, or slices of splits such as `train[:10%]`.
        options: how local files are read.

    Raises:
        UserError: the data does not exist or cannot be read.
    """
    bases = list(dict.fromkeys(re.split(r"\[", part)[0].strip() for part in split.split("+")))
    local = _local(path)
    try:
        is_file, is_dir = local.is_file(), local.is_dir()
    except OSError as error:
        raise UserError(f"{path[:200]!r} cannot be opened ({error.strerror}). Give the path of a file.") from error
    if is_file:
        if ending_of(local) not in READERS:
            raise UserError(f"{str(local)!r} ends in {ending_of(local)!r}, expected one of {_ENDINGS}. Convert it.")
        return _sliced(split, {bases[0]: [_read(local, options)]})
    if is_dir:
        if (local / "dataset_dict.json").is_file() or (local / "state.json").is_file():
            return _sliced(split, _saved(local, bases))
        return _sliced(split, _folder(local, name, bases, options))
    if ending_of(local) in READERS or path.startswith((".", "/", "~")) or path.count("/") > 1:
        raise UserError(f"{path!r} does not exist: {_nearby(local)}")
    try:
        if "/" not in path and path.isidentifier() and find_spec(f"datasets.packaged_modules.{path}"):
            raise ValueError("it is the name of a file format")  # `datasets` would read the working folder
        return DatasetTable(datasets.load_dataset(path, name, split=split))
    except _FAILURES as error:
        raise UserError(
            f"{path!r} is neither a local file or folder nor a readable hub data set: {_root_cause(error)}"
        ) from error


def _read(path: Path, options: FileOptions) -> Table:
    table = READERS[ending_of(path)](path, options)
    table.file = str(path)
    return table


def matching(pattern: str) -> list[str]:
    """Return the files and folders that a pattern such as `shards/*.jsonl` matches, sorted.

    Raises:
        UserError: there is none.
    """
    found = sorted(glob(str(_local(pattern)), recursive=True))
    if not found:
        raise UserError(f"The pattern {pattern!r} matches no file. Correct it, or set glob=false to name one file.")
    return found


def _local(path: str) -> Path:
    try:
        expanded = Path(path).expanduser()
    except RuntimeError as error:  # `~name` of an unknown user
        if not Path(path).exists():
            raise UserError(f"{path!r} does not exist: there is no user {path[1:].split('/')[0]!r}.") from error
        return Path(path)
    return expanded


def _sliced(split: str, tables: Mapping[str, Sequence[Table]]) -> Table:
    """Return the rows of a split expression such as `train[:10%]+test`, where each split is one or more tables."""
    whole = {name: ranges([(table, 0, len(table)) for table in parts]) for name, parts in tables.items()}
    lengths = {name: len(table) for name, table in whole.items()}
    try:
        slices = datasets.ReadInstruction.from_spec(split).to_absolute(lengths)
    except (ValueError, AssertionError) as error:
        raise UserError(f"split {split!r} cannot be read: {error}. Write for example 'train[:10%]'.") from error
    return ranges([(whole[one.splitname], one.from_, max(one.from_, one.to)) for one in slices])


def _choose(splits: Sequence[str], names: Sequence[str], path: Path) -> None:
    for split in splits:
        if split not in names:
            raise UserError(f"{str(path)!r} has no split {split!r}: {nearest(split, names)}")


def _saved(path: Path, splits: Sequence[str]) -> dict[str, list[Table]]:
    """Read a data set written by `save_to_disk`."""
    # Its path must not look like a URL to `datasets`.
    with TemporaryDirectory() as folder:
        link = Path(folder, "data")
        link.symlink_to(path.resolve())
        try:
            found = datasets.load_from_disk(str(link))
        except _FAILURES as error:
            raise _unreadable(path, error, link) from error
    if isinstance(found, datasets.Dataset):
        found = {splits[0]: found}
    _choose(splits, list(found), path)
    return {split: [DatasetTable(found[split].with_format(None))] for split in splits}


def _folder(path: Path, name: str | None, splits: Sequence[str], options: FileOptions) -> dict[str, list[Table]]:
    """Read a folder of files, which belong to splits as `datasets` assigns them.

    `datasets` sees a copy of the folder with empty files under plain names, since it takes names for patterns.
    """
    with TemporaryDirectory() as temporary:
        copy, files = Path(temporary, "data"), {}
        for folder, subfolders, names in os.walk(path, followlinks=True):
            subfolders.sort()
            for file in sorted(names):
                plain = copy.joinpath(*map(_plain, Path(folder, file).relative_to(path).parts))
                while plain in files:
                    plain = plain.with_stem(f"{plain.stem}_")
                files[plain] = Path(folder, file)
                plain.parent.mkdir(parents=True, exist_ok=True)
                plain.touch()
        if (path / "README.md").is_file():  # its header may name configurations
            shutil.copyfile(path / "README.md", copy / "README.md")
        try:
            found = datasets.load_dataset_builder(str(copy), name, cache_dir=temporary).config.data_files or {}
        except _FAILURES as error:
            raise _unreadable(path, error, copy) from error
        _choose(splits, [str(split) for split in found], path)
        chosen = {split: [files[Path(file)] for file in map(str, found[split])] for split in splits}
    tables: dict[str, list[Table]] = {}
    for split, members in chosen.items():
        tables[split] = [_read(file, options) for file in members if ending_of(file) in READERS]
        if not tables[split]:
            raise UserError(f"Folder {str(path)!r} has no data file ({_ENDINGS}) in split {split!r}. Add one.")
    return tables


def _plain(name: str) -> str:
    return re.sub(r"[^\w.-]", "_", name, flags=re.ASCII)


def _unreadable(path: Path, error: BaseException, stand_in: Path) -> UserError:
    cause = _root_cause(error).replace(str(stand_in), str(path))
    return UserError(f"Folder {str(path)!r} cannot be read as a data set: {cause}")


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
    entries = sorted(entry.name for entry in missing.parent.iterdir() if entry.is_dir() or ending_of(entry) in READERS)
    if not entries:
        return f"{str(missing.parent)!r} has no data file ({_ENDINGS})"
    hint = nearest(missing.name, entries)
    more = f" and {len(entries) - 20} more" if hint.startswith("choose") and len(entries) > 20 else ""
    return f"in {str(missing.parent)!r}, {nearest(missing.name, entries[:20]) if more else hint}{more}"
