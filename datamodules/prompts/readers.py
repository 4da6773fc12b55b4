"""Readers of local files by ending: JSON Lines, JSON arrays, parquet, CSV and TSV, the texts also compressed.

Every defect is named with its place.
"""

from __future__ import annotations

import bz2
import codecs
import csv
import gzip
import io
import json
import lzma
import re
import zlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from datamodules.errors import UserError
from datamodules.jsonl import MAX_LINE, STRICT, check_depth, decoded, parse_object
from datamodules.prompts.detection import ANSWERS, PROMPTS
from datamodules.prompts.messages import is_message
from datamodules.prompts.tables import DatasetTable, JsonLinesTable, ListTable, Row, Table

_NUMBER = re.compile(r"-?(0|[1-9]\d{0,17})(\.\d+)?([eE][-+]?\d{1,3})?", re.ASCII)
_TRUTH = {"true": True, "True": True, "false": False, "False": False}


@dataclass(frozen=True, slots=True)
class FileOptions:
    """How local files are read.

    Attributes:
        text_columns: columns of a CSV file that stay text, in addition to the known prompt and answer columns.
        encoding: of text files, e.g. `gbk`; None for UTF-8, and for UTF-16 where a byte order mark says so.
    """

    text_columns: tuple[str, ...] = ()
    encoding: str | None = None


def _content(path: Path, options: FileOptions) -> bytes:
    """Return a text file's content in UTF-8."""
    try:
        content = path.read_bytes()
        if path.suffix in _UNPACK:
            content = _UNPACK[path.suffix](content)
    except (OSError, ValueError, EOFError, lzma.LZMAError, zlib.error) as error:
        cause = getattr(error, "strerror", None) or str(error)
        raise UserError(f"{str(path)!r} cannot be read ({cause}). Give a readable file.") from error
    if not content.strip():
        raise UserError(f"{str(path)!r} is empty. Give a file of rows with a prompt column.")
    encoding = options.encoding or (
        "utf-16" if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) else None
    )
    if encoding is None:
        return content
    try:
        return content.decode(encoding).encode()
    except (UnicodeError, LookupError) as error:
        raise UserError(f"{str(path)!r} is not {encoding} ({error}). Set encoding to the one it has.") from error


def _read_json(path: Path, options: FileOptions) -> Table:
    """Read an array of objects, one object per line, or one object with an array of objects (`{"data": [...]}`)."""
    content, where = _content(path, options), repr(str(path))
    start_of_text = content.removeprefix(codecs.BOM_UTF8).lstrip()
    if start_of_text[:1] == b"[":
        return ListTable(_array(path, content))
    if (rows := _wrapped(start_of_text, where)) is not None:
        return ListTable(rows)
    starts_ends: list[tuple[int, int]] = []
    columns: dict[str, None] = {}
    start = 0
    for number, line in enumerate(io.BytesIO(content), start=1):
        if line.strip():
            columns.update(dict.fromkeys(parse_object(line, f"{where} line {number}")))
            bom = 3 if line.startswith(b"\xef\xbb\xbf") else 0
            starts_ends.append((start + bom, start + len(line)))
        start += len(line)
    return JsonLinesTable(content, np.array(starts_ends, dtype=np.int64).reshape(-1, 2), list(columns))


def _array(path: Path, content: bytes) -> list[Row]:
    where, problem = str(path), ""
    text = decoded(content, repr(where), is_file=True)
    try:
        rows = STRICT.decode(text)
    except json.JSONDecodeError as error:
        problem = f" line {error.lineno}: {error.msg}"
    except ValueError as error:  # a repeated key, or an integer of thousands of digits
        problem = f" line {_failing_line(text)}: {error}"
    except RecursionError:
        problem = " is nested too deeply"
    if problem:
        raise UserError(f"{where!r}{problem}. Write a list of objects.")
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, dict):
            raise UserError(f"{where!r} row {number}: {str(row)[:40]!r} is not an object. Write a list of objects.")
        check_depth(row, f"{where!r} row {number}")
    return rows


def _wrapped(content: bytes, where: str) -> list[Row] | None:
    """Return the rows of a file that is one object with one array of objects; None if it is anything else.

    Raises:
        UserError: it is one object with several.
    """
    first, _, rest = content.partition(b"\n")
    try:
        row = STRICT.decode(first.decode())
        if rest.strip():  # one object per line
            return None
    except ValueError:
        try:
            row = STRICT.decode(content.decode())
        except (ValueError, RecursionError):
            return None  # read as lines, whose errors are named
    except RecursionError:
        return None
    if not isinstance(row, dict) or any(name.lower() in PROMPTS for name in row):
        return None  # no object, or a row
    lists = [
        name
        for name, value in row.items()
        if isinstance(value, list) and value and isinstance(value[0], dict) and not is_message(value[0])
    ]
    if len(lists) > 1:
        raise UserError(
            f"{where} is one object with several lists of rows ({', '.join(map(repr, lists))}). Write a file for each."
        )
    if not lists:
        return None
    for number, one in enumerate(row[lists[0]], start=1):
        if not isinstance(one, dict):
            raise UserError(f"{where} {lists[0]} row {number}: {str(one)[:40]!r} is not an object. Correct it.")
        check_depth(one, f"{where} {lists[0]} row {number}")
    return list(row[lists[0]])


def _failing_line(text: str) -> int:
    """Return the line of an array's first element whose values cannot be read."""
    place = text.index("[")
    try:
        while text[place] != "]":
            place = _next(text, place + 1)
            _, place = STRICT.raw_decode(text, place)
            place = _next(text, place)
    except ValueError:
        pass
    return text.count("\n", 0, place) + 1


def _next(text: str, place: int) -> int:
    """Return the place of the first character from `place` on that is not white space."""
    while text[place].isspace():
        place += 1
    return place


def _read_parquet(path: Path, options: FileOptions) -> Table:
    try:
        with path.open("rb") as file:  # a path would be read as a URL or a partitioned folder
            table = pq.ParquetFile(file).read()
        table.validate(full=True)  # text that is not UTF-8 would fail only when its row is drawn
        return DatasetTable(datasets.Dataset(table))
    except (pa.ArrowException, OSError, ValueError) as error:
        if path.stat().st_size == 0:
            raise UserError(f"{str(path)!r} is empty. Give a file of rows with a prompt column.") from error
        cause = str(error).strip().splitlines()[0]
        raise UserError(f"{str(path)!r} cannot be read as parquet: {cause}") from error


def _read_csv(path: Path, options: FileOptions) -> Table:
    """Read a table whose first row names its columns, separated by commas, semicolons, tabs or bars (RFC 4180).

    Columns that hold only numbers, or only true and false, become such; prompts and answers stay as they are spelt.
    Spaces around the names of columns are not part of them, and where a space follows each separator of the first row,
    it does in all rows.
    """
    text = decoded(_content(path, options), repr(str(path)), is_file=True)
    csv.field_size_limit(MAX_LINE)
    first = next(line for line in text.splitlines() if line.strip())
    separator = (
        "\t" if ".tsv" in path.suffixes else max(",;\t|", key=lambda one: len(next(csv.reader([first], delimiter=one))))
    )
    spaced = all(one.startswith(" ") for one in first.split(separator)[1:])
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator, strict=True, skipinitialspace=spaced)
    records: list[list[str]] = []
    header: list[str] = []
    while True:
        where = f"{str(path)!r} line {reader.line_num + 1}"
        try:
            record = next(reader, None)
        except csv.Error as error:
            raise UserError(f"{where} cannot be read as csv: {error}. Correct its quotes.") from error
        if record is None:
            break
        if not record:
            continue
        if "\0" in "".join(record):
            raise UserError(f"{where} cannot be read as csv: it holds a NUL character. Remove it.")
        if not header:
            header = [cell.strip() or f"Unnamed: {place}" for place, cell in enumerate(record)]
            if repeated := [cell for cell, count in Counter(header).items() if count > 1]:
                raise UserError(f"{where} names the column {repeated[0]!r} more than once. Rename one of them.")
        elif len(record) != len(header):
            raise UserError(
                f"{where} has {len(record)} fields, but the header names {len(header)} columns. Quote fields that "
                "hold a separator, or correct the line."
            )
        else:
            records.append(record)
    texts = {*PROMPTS, *ANSWERS}
    columns = [
        list(cells) if name in options.text_columns or name.lower() in texts else _typed(cells)
        for name, cells in zip(header, zip(*records, strict=True), strict=bool(records))
    ]
    return ListTable([dict(zip(header, values, strict=True)) for values in zip(*columns, strict=True)], header)


def _typed(cells: Sequence[str]) -> Sequence[object]:
    if all(map(_NUMBER.fullmatch, cells)):
        return [json.loads(cell) for cell in cells]
    if all(cell in _TRUTH for cell in cells):
        return [_TRUTH[cell] for cell in cells]
    return cells


_UNPACK: dict[str, Callable[[bytes], bytes]] = {
    ".gz": gzip.decompress,
    ".bz2": bz2.decompress,
    ".xz": lzma.decompress,
}
_TEXT: dict[str, Callable[[Path, FileOptions], Table]] = {
    ".jsonl": _read_json,
    ".ndjson": _read_json,
    ".json": _read_json,
    ".csv": _read_csv,
    ".tsv": _read_csv,
}
READERS: dict[str, Callable[[Path, FileOptions], Table]] = {
    **_TEXT,
    ".parquet": _read_parquet,
    **{ending + packed: reader for ending, reader in _TEXT.items() for packed in _UNPACK},
}
"""The supported endings. A reader raises UserError."""


def ending_of(path: Path) -> str:
    """Return the ending that says how a file is read: its last, or its last two if it is compressed."""
    return "".join(path.suffixes[-2:]) if path.suffix in _UNPACK else path.suffix
