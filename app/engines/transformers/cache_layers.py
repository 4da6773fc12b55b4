"""Buffers of keys and values in one layer: of what rows generate, and of the contexts that they read."""

from __future__ import annotations

import numpy as np
import torch
from transformers.cache_utils import CacheLayerMixin, DynamicLayer


class WrittenLayer(CacheLayerMixin):
    """Keys and values of generated tokens in one layer: buffers `[max_rows, key_value_heads, columns, head_dim]`.

    The model sees the first `rows` rows and the columns from `first` to `end`.
    """

    is_sliding = False

    def __init__(self, max_rows: int, columns: int) -> None:
        super().__init__()
        self.max_rows, self.columns = max_rows, columns
        self.rows = self.first = self.end = 0

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        # Autocast rotates keys in float32 and then multiplies them in the dtype of values.
        self.keys, self.values = (
            value_states.new_empty(self.max_rows, states.shape[1], self.columns, states.shape[3])
            for states in (key_states, value_states)
        )
        self.is_initialized = True

    def buffers(self) -> tuple[torch.Tensor, torch.Tensor]:
        assert self.keys is not None
        assert self.values is not None
        return self.keys, self.values

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: object, **kwargs: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append `[rows, key_value_heads, 1, head_dim]` states and return views of the whole window."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        before, self.end = self.end, self.end + key_states.shape[2]
        keys, values = self.buffers()
        keys[: self.rows, :, before : self.end] = key_states
        values[: self.rows, :, before : self.end] = value_states
        return keys[: self.rows, :, self.first : self.end], values[: self.rows, :, self.first : self.end]

    def admit(self, count: int) -> None:
        """Append `count` rows without generated tokens."""
        if self.rows == 0:
            self.first = self.end = 0
        elif self.is_initialized:
            for buffer in self.buffers():
                # A masked column enters the weighted sum with weight 0, and 0 * NaN is NaN.
                buffer[self.rows : self.rows + count, :, self.first : self.end] = 0
        self.rows += count

    def keep(self, rows: int, moved_to: torch.Tensor, moved_from: torch.Tensor) -> None:
        """Keep `rows` rows, after moving some into the slots of removed rows."""
        if len(moved_to) and self.is_initialized:
            for buffer in self.buffers():
                buffer[moved_to, :, self.first : self.end] = buffer[moved_from, :, self.first : self.end]
        self.rows = rows

    def rewind(self) -> None:
        """Move the window to the buffer's left end."""
        for buffer in self.buffers():
            window = buffer[: self.rows, :, self.first : self.end].clone()
            buffer[: self.rows, :, : window.shape[2]] = window
        self.first, self.end = 0, self.end - self.first

    def get_seq_length(self) -> int:
        return self.end - self.first

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.get_seq_length() + query_length, 0

    def get_max_length(self) -> int:
        return self.columns


class StaticLayer(WrittenLayer):
    """The same with views whose shapes and addresses stay: new states go to the column that a tensor names.

    Attributes:
        column: int64 `[1]`, on the device: where the next states are written.
        shown: numbers of rows and columns that the model sees; `first` stays 0.
    """

    column: torch.Tensor
    shown: tuple[int, int]

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        super().lazy_initialization(key_states, value_states)
        for buffer in self.buffers():
            buffer.zero_()  # columns are seen, with weight 0, before they are written; 0 * NaN is NaN

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: object, **kwargs: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write `[R, key_value_heads, 1, head_dim]` states and return views of the shown rows and columns."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        rows, columns = self.shown
        keys, values = self.buffers()
        for buffer, states in ((keys, key_states), (values, value_states)):
            buffer[:rows].index_copy_(2, self.column, states.to(buffer.dtype))
        return keys[:rows, :, :columns], values[:rows, :, :columns]


class ContextLayer:
    """Keys and values of contexts in one layer: buffers `[contexts, key_value_heads, columns, head_dim]`.

    The column of a token is its position; what lies behind a context's last token is finite and not to be read.

    Args:
        contexts: maximum number of contexts.
        prefilled: states of the first ones, for shapes and dtype.
        columns: number of tokens that a context has room for; None for the longest of the first ones.
    """

    def __init__(self, contexts: int, prefilled: DynamicLayer, columns: int | None = None) -> None:
        keys, values = _states_of(prefilled)
        self.columns = columns or keys.shape[2]
        # Zeros: a masked column enters the weighted sum with weight 0, and 0 * NaN is NaN.
        self.keys, self.values = (
            values.new_zeros(contexts, states.shape[1], self.columns, states.shape[3]) for states in (keys, values)
        )

    def buffers(self) -> tuple[torch.Tensor, torch.Tensor]:
        return self.keys, self.values

    def admit(self, prefilled: DynamicLayer, first: int, lengths: np.ndarray) -> None:
        """Write the left-padded contexts of `prefilled`, of `lengths` tokens, from place `first` on."""
        for buffer, states in zip(self.buffers(), _states_of(prefilled), strict=True):
            width = states.shape[2]
            into = buffer[first : first + len(states), :, :width]
            if (lengths == width).all():
                into.copy_(states)
                continue
            columns = torch.from_numpy((np.arange(width) + width - lengths[:, None]).clip(max=width - 1))
            into.copy_(states.take_along_dim(columns.to(states.device)[:, None, :, None], dim=2))

    def fit(self, columns: int) -> None:
        """Grow to a number of columns, if it has fewer.

        To exactly this number: a CPU reads the contexts that rows read twice as fast if nothing lies between them.
        """
        if columns > self.columns:
            more = columns - self.columns

            self.keys, self.values = (torch.nn.functional.pad(one, (0, 0, 0, more)) for one in self.buffers())
            self.columns = columns

    def copy(self, copy_to: torch.Tensor, copied: torch.Tensor, width: int) -> None:
        """Copy the first `width` columns of some contexts."""
        for buffer in self.buffers():
            buffer[copy_to, :, :width] = buffer[copied, :, :width]

    def write(self, contexts: torch.Tensor, columns: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Write the states of `T` tokens of each of `n` contexts.

        Args:
            contexts: int64 `[n]`.
            columns: int64 `[n, T]`.
            keys: `[n, key_value_heads, T, head_dim]`.
            values: same shape as `keys`.
        """
        for buffer, states in zip(self.buffers(), (keys, values), strict=True):
            buffer[contexts[:, None], :, columns] = states.transpose(1, 2).to(buffer.dtype)


def _states_of(prefilled: DynamicLayer) -> tuple[torch.Tensor, torch.Tensor]:
    assert prefilled.keys is not None
    assert prefilled.values is not None
    return prefilled.keys, prefilled.values
