"""Random access to rows, on disk or in memory, through one small interface."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Protocol

import datasets
import numpy as np

BATCH = 1000

Row = Mapping[str, object]


class Table(Protocol):
    """A sequence of rows; each row maps column names to values."""

    def __len__(self) -> int: ...
    def rows(self, positions: Sequence[int] | np.ndarray) -> list[Row]: ...
    def narrow(self, columns: Sequence[str]) -> Table: ...


class DatasetTable:
    """Rows of a `datasets.Dataset`, read from its memory-mapped file on demand."""

    def __init__(self, dataset: datasets.Dataset) -> None:
        self.dataset = dataset
        self._json = [name for name, feature in dataset.features.items() if isinstance(feature, datasets.Json)]

    def __len__(self) -> int:
        return len(self.dataset)

    def rows(self, positions: Sequence[int] | np.ndarray) -> list[Row]:
        if not len(positions):
            return []
        first, last = int(positions[0]), int(positions[-1])
        adjacent = last - first + 1 == len(positions) and bool(np.all(np.diff(positions) == 1))
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
    """Rows in memory."""

    def __init__(self, items: Sequence[Row]) -> None:
        self.items = items

    def __len__(self) -> int:
        return len(self.items)

    def rows(self, positions: Sequence[int] | np.ndarray) -> list[Row]:
        return [self.items[int(place)] for place in positions]

    def narrow(self, columns: Sequence[str]) -> ListTable:
        return self


def batches(table: Table, positions: np.ndarray) -> Iterator[tuple[np.ndarray, list[Row]]]:
    """Yield positions and their rows, `BATCH` at a time, in the given order."""
    for start in range(0, len(positions), BATCH):
        part = positions[start : start + BATCH]
        yield part, table.rows(part)
