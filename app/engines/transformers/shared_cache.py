"""Key-value cache that stores each prompt once for all its completions.

Prompts are right-aligned in separate buffers that are written once. The tokens that rows generate share one column per
step; a row that joins later has padding before its first column. Positions are encoded in the keys, so a row can begin
at any column.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from transformers import Cache
from transformers.cache_utils import CacheLayerMixin, DynamicLayer

from app.engines.transformers.decode_attention import DECODE, SharedKeys
from app.engines.transformers.kv_cache import RowCache
from app.engines.transformers.schedule import fill_holes
from app.engines.transformers.step_graphs import StepShape, padded_columns, padded_count

SLACK = 64
"""Spare columns: the window of generated tokens moves back to the left at most once per this many tokens."""


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


class PromptLayer:
    """Keys and values of the prompts in one layer: buffers `[max_prompts, key_value_heads, longest, head_dim]`.

    Args:
        max_prompts: number of prompts that are kept.
        prefilled: states of the first prompts, for shapes and dtype.
        longest: maximum number of tokens of a prompt; None for that of the first ones.
    """

    def __init__(self, max_prompts: int, prefilled: DynamicLayer, longest: int | None = None) -> None:
        keys, values = _states_of(prefilled)
        self.longest = longest or keys.shape[2]
        # Zeros: a masked column enters the weighted sum with weight 0, and 0 * NaN is NaN.
        self.keys, self.values = (
            values.new_zeros(max_prompts, states.shape[1], self.longest, states.shape[3]) for states in (keys, values)
        )

    def admit(self, prefilled: DynamicLayer, first: int) -> None:
        """Write the left-padded prompts of `prefilled` into the slots from `first` on."""
        for buffer, states in zip((self.keys, self.values), _states_of(prefilled), strict=True):
            buffer[first : first + len(states), :, self.longest - states.shape[2] :] = states

    def keep(self, moved_to: torch.Tensor, moved_from: torch.Tensor) -> None:
        for buffer in (self.keys, self.values):
            buffer[moved_to] = buffer[moved_from]


def _states_of(prefilled: DynamicLayer) -> tuple[torch.Tensor, torch.Tensor]:
    assert prefilled.keys is not None
    assert prefilled.values is not None
    return prefilled.keys, prefilled.values


class SharedPromptCache(RowCache):
    """Shared cache for models whose layers all attend to the whole context.

    Args:
        layers: number of layers of the model.
        max_rows: maximum number of rows decoded together.
        max_prompts: maximum number of prompts whose rows are decoded together.
        columns: maximum number of tokens that a row can generate.
        rows_per_prompt: maximum number of a prompt's rows.
        layer: `StaticLayer` for `static_numbers` and `static_inputs` instead of `inputs`.
        longest: maximum number of tokens of a prompt; None for that of those that are admitted first.
    """

    can_join = True
    attention = DECODE

    def __init__(
        self,
        layers: int,
        max_rows: int,
        max_prompts: int,
        columns: int,
        rows_per_prompt: int,
        layer: type[WrittenLayer] = WrittenLayer,
        longest: int | None = None,
    ) -> None:
        super().__init__()
        self.longest = longest
        self.max_rows, self.max_prompts, self.rows_per_prompt = max_rows, max_prompts, rows_per_prompt
        self.written = [layer(max_rows, columns + SLACK) for _ in range(layers)]
        self.read: list[PromptLayer] = []
        self.past = Cache(layers=[*self.written])
        self.prompt_of_row = self.lengths = np.zeros(0, dtype=np.int64)

    def admit(self, prefilled: Cache, source: np.ndarray, lengths: np.ndarray) -> None:
        states = [layer for layer in prefilled.layers if isinstance(layer, DynamicLayer)]
        self.read = self.read or [PromptLayer(self.max_prompts, layer, self.longest) for layer in states]
        for written, read, layer in zip(self.written, self.read, states, strict=True):
            written.admit(len(source))
            read.admit(layer, len(self.lengths))
        self.starts = np.concatenate([self.starts, np.full(len(source), self.written[0].end)])
        self.prompt_of_row = np.concatenate([self.prompt_of_row, source + len(self.lengths)])
        _, first_rows = np.unique(source, return_index=True)
        self.lengths = np.concatenate([self.lengths, lengths[first_rows]])
        self._place_rows()

    def keep(self, order: np.ndarray) -> None:
        moved = np.flatnonzero(order != np.arange(len(order)))
        for layer in self.written:
            layer.keep(len(order), torch.from_numpy(moved), torch.from_numpy(order[moved]))
        self.starts, self.prompt_of_row = self.starts[order], self.prompt_of_row[order]
        self._drop_finished_prompts()
        self._place_rows()

    def states_of(self, rows: np.ndarray) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Return copies of the keys and values of rows (int64 `[r]`), their prompts included.

        Returns:
            For each row its keys and its values, `[layers, key_value_heads, tokens, head_dim]`. The last token that was
            drawn for it is not among them: the model has not read it.
        """
        prompts, starts = self.prompt_of_row[rows], self.starts[rows]
        lengths = self.lengths[prompts]
        longest, first, end = int(lengths.max()), int(starts.min()), self.written[0].end
        written = self.written if self.written[0].is_initialized else []  # by the second token of any row
        parts = []
        for number in (0, 1):
            of_prompts = [(read.keys, read.values)[number][prompts, :, read.longest - longest :] for read in self.read]
            of_rows = [layer.buffers()[number][rows, :, first:end] for layer in written]
            parts.append(torch.cat([torch.stack(of_prompts), *([torch.stack(of_rows)] if written else [])], dim=3))
        # The tokens of a row's prompt end where its own begin, unless another row has begun before it.
        found = []
        for row, (length, start) in enumerate(zip(lengths.tolist(), starts.tolist(), strict=True)):
            both = (whole[:, row, :, longest - length :] for whole in parts)
            if start > first:
                both = (torch.cat([one[:, :, :length], one[:, :, length + start - first :]], dim=2) for one in both)
            keys, values = both
            found.append((keys, values))
        return found

    def _drop_finished_prompts(self) -> None:
        alive = np.bincount(self.prompt_of_row, minlength=len(self.lengths)) > 0
        if alive.all():
            return
        order = fill_holes(alive)
        moved = np.flatnonzero(order != np.arange(len(order)))
        for layer in self.read if len(moved) else ():
            layer.keep(torch.from_numpy(moved), torch.from_numpy(order[moved]))
        self.lengths = self.lengths[order]
        place = np.empty(len(alive), dtype=np.int64)
        place[order] = np.arange(len(order))
        self.prompt_of_row = place[self.prompt_of_row]

    def _place_rows(self) -> None:
        """Number the rows of every prompt, and record which of its prompt's columns each row sees."""
        counts = np.bincount(self.prompt_of_row, minlength=len(self.lengths))
        by_prompt = np.argsort(self.prompt_of_row, kind="stable")
        within = np.empty_like(by_prompt)
        within[by_prompt] = np.arange(len(by_prompt)) - np.repeat(np.cumsum(counts) - counts, counts)
        self._within = within
        self._rows, self._places = places_of_rows(self.prompt_of_row, within, self.read[0].keys.shape[1])
        longest = int(self.lengths.max(initial=0))
        self._unread = np.arange(longest) < (longest - self.lengths[self.prompt_of_row])[:, None]

    def _make_room(self) -> None:
        """Move the window of generated tokens to the left if its buffer is full."""
        if self.written[0].end == self.written[0].columns:
            oldest = int(self.starts.min())
            for layer in self.written:
                layer.first = oldest
                layer.rewind()
            self.starts -= oldest

    def inputs(self, device: torch.device) -> dict[str, object]:
        self._make_room()
        oldest = int(self.starts.min())
        for layer in self.written:
            layer.first = oldest
        first, end = self.written[0].first, self.written[0].end
        unseen = np.concatenate([self._unread, np.arange(first, end + 1) < self.starts[:, None]], axis=1)
        g, longest = len(self.lengths), self._unread.shape[1]
        layout = SharedKeys(
            keys=[layer.keys[:g, :, layer.longest - longest :] for layer in self.read],
            values=[layer.values[:g, :, layer.longest - longest :] for layer in self.read],
            rows=torch.from_numpy(self._rows).to(device),
            places=torch.from_numpy(self._places).to(device),
            bias=torch.from_numpy(np.where(unseen, np.float32(-np.inf), np.float32(0))[:, None]).to(device)
            if unseen.any()
            else None,
        )
        return {"past_key_values": self.past, "layout": layout}

    def static_numbers(self, token: np.ndarray, position: np.ndarray) -> tuple[StepShape, np.ndarray]:
        """Prepare one more column, and return the shape of the next step with all that it reads from the host.

        Args:
            token: int64 `[n]`: the last tokens of the rows.
            position: int64 `[n]`: their positions.

        Returns:
            The padded shape and int64 `[X]`, which `static_inputs` takes apart.
        """
        self._make_room()
        column = self.written[0].end
        for layer in self.written:
            layer.end += 1
        n, heads, longest = len(token), self.read[0].keys.shape[1], self._unread.shape[1]
        shape = StepShape(
            padded_count(n, self.max_rows),
            padded_count(len(self.lengths), self.max_prompts),
            padded_columns(longest, self.read[0].longest),
            padded_columns(column + 1, self.written[0].columns),
        )
        # A padding row is one of a token that sees everything: nothing that it computes is infinite, or read.
        rows = np.zeros((4, shape.rows), dtype=np.int64)
        rows[:, :n] = token, position, shape.longest - self.lengths[self.prompt_of_row], self.starts
        places = np.zeros(shape.rows * heads, dtype=np.int64)
        slots = np.zeros(shape.prompts * heads * self.rows_per_prompt, dtype=np.int64)
        found, places[: n * heads] = places_of_rows(self.prompt_of_row, self._within, heads, self.rows_per_prompt)
        slots[: len(found)] = found
        return shape, np.concatenate([rows.reshape(-1), [column], places, slots])

    def static_inputs(self, shape: StepShape, numbers: torch.Tensor) -> dict[str, Any]:
        """Return the forward's arguments, whose tensors are made of `numbers` on its device."""
        heads = self.read[0].keys.shape[1]
        slots = shape.prompts * heads * self.rows_per_prompt
        rows, column, places, by_prompt = numbers.split([4 * shape.rows, 1, shape.rows * heads, slots])
        token, position, unread, start = rows.view(4, shape.rows)
        for layer in self.written:
            assert isinstance(layer, StaticLayer)
            layer.column, layer.shown = column, (shape.rows, shape.columns)
        of_prompt, of_row = (torch.arange(size, device=numbers.device) for size in (shape.longest, shape.columns))
        seen = torch.cat([of_prompt >= unread[:, None], (of_row >= start[:, None]) & (of_row <= column)], dim=1)
        layout = SharedKeys(
            keys=[layer.keys[: shape.prompts, :, layer.longest - shape.longest :] for layer in self.read],
            values=[layer.values[: shape.prompts, :, layer.longest - shape.longest :] for layer in self.read],
            rows=by_prompt,
            places=places,
            bias=torch.zeros(seen.shape, device=numbers.device).masked_fill_(~seen, -torch.inf)[:, None],
        )
        return {
            "input_ids": token[:, None],
            "position_ids": position[:, None],
            "past_key_values": self.past,
            "layout": layout,
        }


def places_of_rows(
    prompt_of_row: np.ndarray, within: np.ndarray, heads: int, most: int | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Return `SharedKeys.rows` and `SharedKeys.places`.

    Args:
        prompt_of_row: int64 `[n]`: 0 .. g - 1, each at least once.
        within: int64 `[n]`: index of the row among those of its prompt.
        heads: number of key-value heads.
        most: `SharedKeys.W`; None for the largest number of a prompt's rows.
    """
    most = int(within.max(initial=-1)) + 1 if most is None else most
    prompts = int(prompt_of_row.max(initial=-1)) + 1
    head = np.arange(heads)
    places = (prompt_of_row[:, None] * heads + head) * most + within[:, None]
    rows = np.zeros(prompts * heads * most, dtype=np.int64)
    rows[places] = np.arange(len(within))[:, None] * heads + head
    return rows, places.reshape(-1)
