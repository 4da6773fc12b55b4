"""Random access to rows through one small interface: Arrow tables, lines of JSON, lists, and ranges of all these."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Protocol

import datasets
import numpy as np

BATCH = 1000

Row = Mapping[str, object]


class Table(Protocol):
    """A sequence of rows; each row maps column names to values.

    Attributes:
        file: the local file that holds them; empty if it is not one file.
    """

    file: str

    @property
    def columns(self) -> Sequence[str]: ...
    def __len__(self) -> int: ...
    def rows(self, positions: Sequence[int] | np.ndarray) -> list[Row]: ...
    def narrow(self, columns: Sequence[str]) -> Table: ...


class DatasetTable:
    """Rows of a `datasets.Dataset`."""

    def __init__(self, dataset: datasets.Dataset) -> None:
        self.dataset = dataset
        self.file = ""
        self._json = [name for name, feature in dataset.features.items() if isinstance(feature, datasets.Json)]

    @property
    def columns(self) -> Sequence[str]:
        return self.dataset.column_names

    def __len__(self) -> int:
        return len(self.dataset)

    def rows(self, positions: Sequence[int] | np.ndarray) -> list[Row]:
        if not len(positions):
            return []
        first, last = int(positions[0]), int(positions[-1])
        adjacent = bool(np.all(np.diff(positions) == 1))
        chosen = slice(first, last + 1) if adjacent else [int(place) for place in positions]
        columns = self.dataset[chosen]
        if self._json:  # `datasets` itself decodes with ujson, which changes the last digits of numbers
            texts = self.dataset.select_columns(self._json).with_format("arrow")[chosen]
            columns |= {
                name: [None if text is None else json.loads(text) for text in texts[name].to_pylist()]
                for name in self._json
            }
        return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]

    def narrow(self, columns: Sequence[str]) -> DatasetTable:
        """Return the same rows with only those of `columns` that exist, so that a scan decodes only what it needs."""
        existing = [name for name in dict.fromkeys(columns) if name in self.dataset.column_names]
        return DatasetTable(self.dataset.select_columns(existing))


class ListTable:
    """Rows in memory. A row without a column has None there.

    Args:
        items: the rows.
        columns: names of all columns; None for those that occur in the rows.
    """

    def __init__(self, items: Sequence[Row], columns: Sequence[str] | None = None) -> None:
        self.items = items
        self.columns = list(dict.fromkeys(name for row in items for name in row)) if columns is None else columns
        self.file = ""

    def __len__(self) -> int:
        return len(self.items)

    def rows(self, positions: Sequence[int] | np.ndarray) -> list[Row]:
        return [{**dict.fromkeys(self.columns), **self.items[int(place)]} for place in positions]

    def narrow(self, columns: Sequence[str]) -> ListTable:
        return self


class JsonLinesTable:
    """Lines of JSON objects, parsed when they are read: values are as in the file, and memory is the file's size.

    Args:
        content: the file's bytes.
        places: int64 `[Q, 2]`, start and end of each row in `content`.
        columns: names of all columns; a row without one has None there.
    """

    def __init__(self, content: bytes, places: np.ndarray, columns: Sequence[str]) -> None:
        self.content, self.places, self.columns = content, places, columns
        self.file = ""

    def __len__(self) -> int:
        return len(self.places)

    def rows(self, positions: Sequence[int] | np.ndarray) -> list[Row]:
        places = self.places[np.asarray(positions, dtype=np.int64)].tolist()
        lines = (self.content[start:end] for start, end in places)
        return [dict.fromkeys(self.columns) | json.loads(line) for line in lines]

    def narrow(self, columns: Sequence[str]) -> JsonLinesTable:
        return self


class Ranges:
    """Ranges of rows of several tables, one after the other.

    Args:
        parts: a table and the half-open range of its rows, each.
    """

    def __init__(self, parts: Sequence[tuple[Table, int, int]]) -> None:
        self.parts = parts
        self.file = ""
        self.columns: Sequence[str] = list(dict.fromkeys(name for table, _, _ in parts for name in table.columns))
        self._ends = np.cumsum([end - start for _, start, end in parts], dtype=np.int64)

    def __len__(self) -> int:
        return int(self._ends[-1])

    def rows(self, positions: Sequence[int] | np.ndarray) -> list[Row]:
        places = np.asarray(positions, dtype=np.int64)
        owners = np.searchsorted(self._ends, places, side="right")
        found: list[Row] = []
        for run in np.split(np.arange(len(places)), np.flatnonzero(np.diff(owners)) + 1):
            if len(run):
                table, start, end = self.parts[owners[run[0]]]
                first = self._ends[owners[run[0]]] - (end - start)
                found += [dict.fromkeys(self.columns) | row for row in table.rows(places[run] - first + start)]
        return found

    def narrow(self, columns: Sequence[str]) -> Ranges:
        """See `DatasetTable.narrow`."""
        return Ranges([(table.narrow(columns), start, end) for table, start, end in self.parts])


def ranges(parts: Sequence[tuple[Table, int, int]]) -> Table:
    """Return `Ranges`, or the table itself if it is the only one and whole."""
    table, start, end = parts[0]
    return table if len(parts) == 1 and (start, end) == (0, len(table)) else Ranges(parts)


def files_of(table: Table) -> Iterator[Table]:
    """Yield the tables of single files that a table consists of."""
    if isinstance(table, Ranges):
        for part, start, end in table.parts:
            if end > start:
                yield from files_of(part)
    else:
        yield table


def batches(table: Table, positions: np.ndarray) -> Iterator[tuple[np.ndarray, list[Row]]]:
    """Yield positions and their rows, `BATCH` at a time, in the given order."""
    for start in range(0, len(positions), BATCH):
        part = positions[start : start + BATCH]
        yield part, table.rows(part)
