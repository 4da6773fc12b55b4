"""Key-value caches whose rows come and go while the others are being decoded.

All rows share the column that is written next; a row that joins is aligned to its right end, and the columns before
its context are masked. Positions are encoded in the keys, so a row can sit at any column.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import cast

import numpy as np
import torch
from transformers import Cache, DynamicCache, PreTrainedConfig
from transformers.cache_utils import CacheLayerMixin, DynamicLayer

SLACK = 64
"""Spare columns of an in-place cache: it moves its window back to the left at most once per so many tokens."""


class RowLayer(CacheLayerMixin):
    """One layer's keys and values in buffers `[max_rows, heads, columns, head_dim]`, written in place.

    The model sees the first `rows` rows and the columns `first` to `end`.
    """

    is_sliding = False

    def __init__(self, max_rows: int, columns: int) -> None:
        super().__init__()
        self.max_rows, self.columns = max_rows, columns
        self.rows = self.first = self.end = 0

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        # Zeros, because a masked column still enters the weighted sum with weight 0, and 0 * NaN is NaN.
        self.keys = self._buffer_like(key_states)
        self.values = self._buffer_like(value_states)
        self.is_initialized = True

    def _buffer_like(self, states: torch.Tensor) -> torch.Tensor:
        return states.new_zeros(self.max_rows, states.shape[1], self.columns, states.shape[3])

    def _buffers(self) -> tuple[torch.Tensor, torch.Tensor]:
        assert self.keys is not None
        assert self.values is not None
        return self.keys, self.values

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: object, **kwargs: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Appends `[rows, heads, T, head_dim]` states and returns views of the whole window."""
        before, self.end = self.end, self.end + key_states.shape[2]
        keys, values = self._buffers()
        keys[: self.rows, :, before : self.end] = key_states
        values[: self.rows, :, before : self.end] = value_states
        return keys[: self.rows, :, self.first : self.end], values[: self.rows, :, self.first : self.end]

    def admit(self, prefilled: DynamicLayer, source: torch.Tensor) -> None:
        """Appends copies of the rows `source` of `prefilled`, right-aligned to the last column."""
        keys, values = prefilled.keys, prefilled.values
        assert keys is not None
        assert values is not None
        if not self.is_initialized:
            self.lazy_initialization(keys, values)
        if self.rows == 0:
            self.first, self.end = 0, keys.shape[2]
        rows, columns = slice(self.rows, self.rows + len(source)), slice(self.end - keys.shape[2], self.end)
        for buffer, states in zip(self._buffers(), (keys, values), strict=True):
            buffer[rows, :, columns] = states[source]
        self.rows += len(source)

    def keep(self, rows: int, moved_to: torch.Tensor, moved_from: torch.Tensor) -> None:
        """Leaves `rows` rows, after moving some into the places of rows that are gone."""
        if len(moved_to):
            for buffer in self._buffers():
                buffer[moved_to, :, self.first : self.end] = buffer[moved_from, :, self.first : self.end]
        self.rows = rows

    def rewind(self) -> None:
        """Moves the window to the buffer's left end."""
        for buffer in self._buffers():
            window = buffer[: self.rows, :, self.first : self.end].clone()
            buffer[: self.rows, :, : window.shape[2]] = window
        self.first, self.end = 0, self.end - self.first

    def get_seq_length(self) -> int:
        return self.end - self.first

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.get_seq_length() + query_length, 0

    def get_max_length(self) -> int:
        return self.columns


class RowCache(ABC):
    """What the decode loop needs of a cache, and the bookkeeping of each row's first column.

    Attributes:
        past: what the model is given as `past_key_values`.
        starts: int64 `[rows]`: the first column of each row's context; earlier columns are padding.
        can_join: whether rows may be admitted while others are being decoded.
    """

    past: Cache
    can_join: bool

    def __init__(self) -> None:
        self.starts = np.zeros(0, dtype=np.int64)

    @abstractmethod
    def admit(self, prefilled: Cache, source: np.ndarray, lengths: np.ndarray) -> None:
        """Appends one row per entry of `source` (a row of `prefilled`), whose prompt has `lengths` tokens."""

    @abstractmethod
    def keep(self, order: np.ndarray) -> None:
        """Leaves `len(order)` rows: row i is the former row `order[i]`."""

    @abstractmethod
    def window(self) -> tuple[int, int]:
        """Prepares one more column; first visible column and the column that will be written."""

    def attention_mask(self, device: torch.device) -> torch.Tensor | None:
        """int64 `[rows, columns]` for the next token's forward; None when no row has any padding."""
        first, end = self.window()
        if not (self.starts > first).any():
            return None
        starts = torch.from_numpy(self.starts).to(device)
        return (torch.arange(first, end + 1, device=device) >= starts[:, None]).long()


class InPlaceCache(RowCache):
    """For models in which every layer attends to the whole context: preallocated, rows join at any time.

    Args:
        layers: of the model.
        max_rows: decoded together.
        columns: the longest context that a row can reach.
    """

    can_join = True

    def __init__(self, layers: int, max_rows: int, columns: int) -> None:
        super().__init__()
        self.layers = [RowLayer(max_rows, columns + SLACK) for _ in range(layers)]
        self.past = Cache(layers=[*self.layers])

    def admit(self, prefilled: Cache, source: np.ndarray, lengths: np.ndarray) -> None:
        for layer, states in zip(self.layers, prefilled.layers, strict=True):
            assert isinstance(states, DynamicLayer)
            layer.admit(states, torch.from_numpy(source))
        self.starts = np.concatenate([self.starts, self.layers[0].end - lengths])

    def keep(self, order: np.ndarray) -> None:
        moved = np.flatnonzero(order != np.arange(len(order)))
        for layer in self.layers:
            layer.keep(len(order), torch.from_numpy(moved), torch.from_numpy(order[moved]))
        self.starts = self.starts[order]

    def window(self) -> tuple[int, int]:
        first = int(self.starts.min())
        for layer in self.layers:
            layer.first = first
        if self.layers[0].end == self.layers[0].columns:
            for layer in self.layers:
                layer.rewind()
            self.starts -= first
        return self.layers[0].first, self.layers[0].end


class GrowingCache(RowCache):
    """For sliding-window, linear-attention and other layers: the model's own cache; rows join only an empty one."""

    can_join = False

    def __init__(self) -> None:
        super().__init__()
        self._end = 0

    def admit(self, prefilled: Cache, source: np.ndarray, lengths: np.ndarray) -> None:
        self.past = prefilled
        self._end = int(prefilled.get_seq_length())
        self.past.reorder_cache(_row_numbers(source))
        self.starts = self._end - lengths

    def keep(self, order: np.ndarray) -> None:
        self.past.reorder_cache(_row_numbers(order))
        self.starts = self.starts[order]

    def window(self) -> tuple[int, int]:
        self._end += 1
        return 0, self._end - 1


def _row_numbers(rows: np.ndarray) -> torch.LongTensor:
    return cast(torch.LongTensor, torch.from_numpy(rows))


def row_cache(config: PreTrainedConfig, max_rows: int, columns: int) -> RowCache:
    """The in-place cache when `config` describes nothing but full attention, else the growing one."""
    if full_attention_only(config):
        return InPlaceCache(len(DynamicCache(config=config).layers), max_rows, columns)
    return GrowingCache()


def full_attention_only(config: PreTrainedConfig) -> bool:
    """Whether every layer attends to the whole context: no sliding window, no linear attention or the like."""
    layers = DynamicCache(config=config).layers
    return bool(layers) and all(type(layer) is DynamicLayer for layer in layers)
