"""Key-value cache that stores each context once for all rows that read it.

A context is a prompt, which its completions share, or a conversation so far. Contexts begin at the first column of
separate buffers. The tokens that rows generate share one column per step; a row that joins later has padding before its
first column. Positions are encoded in the keys, so a row can begin at any column.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
import torch
from transformers import Cache
from transformers.cache_utils import DynamicLayer

from app.engines.transformers.cache_layers import ContextLayer, StaticLayer, WrittenLayer
from app.engines.transformers.decode_attention import DECODE, ContextKeys, SharedKeys
from app.engines.transformers.kv_cache import RowCache
from app.engines.transformers.schedule import fill_holes
from app.engines.transformers.step_graphs import StepShape, padded_columns, padded_count

SLACK = 64
"""Spare columns: the window of generated tokens moves back to the left at most once per this many tokens."""


class SharedContextCache(RowCache):
    """Shared cache for models whose layers all attend to the whole context.

    Args:
        layers: number of layers of the model.
        max_rows: maximum number of rows decoded together.
        max_contexts: maximum number of contexts that rows read or that are parked.
        columns: maximum number of tokens that a row can generate.
        rows_per_context: maximum number of a context's rows.
        layer: `StaticLayer` for `static_numbers` and `static_inputs` instead of `inputs`.
        longest: maximum number of tokens of a context; None for buffers that grow with them.

    Attributes:
        parked: the place of each context that is kept though no row reads it, by conversation.
    """

    can_join = True
    attention = DECODE

    def __init__(
        self,
        layers: int,
        max_rows: int,
        max_contexts: int,
        columns: int,
        rows_per_context: int,
        layer: type[WrittenLayer] = WrittenLayer,
        longest: int | None = None,
    ) -> None:
        super().__init__()
        self.longest = longest
        self.max_rows, self.max_contexts, self.rows_per_context = max_rows, max_contexts, rows_per_context
        self.written = [layer(max_rows, columns + SLACK) for _ in range(layers)]
        self.contexts: list[ContextLayer] = []
        self.past = Cache(layers=[*self.written])
        self.context_of_row = self.lengths = np.zeros(0, dtype=np.int64)
        self.parked: dict[int, int] = {}

    def admit(self, prefilled: Cache, source: np.ndarray, lengths: np.ndarray) -> None:
        states = [layer for layer in prefilled.layers if isinstance(layer, DynamicLayer)]
        self.contexts = self.contexts or [ContextLayer(self.max_contexts, layer, self.longest) for layer in states]
        _, first_rows = np.unique(source, return_index=True)
        self._fit(int(lengths.max()))
        for context, layer in zip(self.contexts, states, strict=True):
            context.admit(layer, len(self.lengths), lengths[first_rows])
        added = source + len(self.lengths)
        self.lengths = np.concatenate([self.lengths, lengths[first_rows]])
        self._join(added)

    def _join(self, contexts: np.ndarray) -> None:
        """Append a row without generated tokens for each entry of `contexts`, whose context it reads."""
        for written in self.written:
            written.admit(len(contexts))
        self.starts = np.concatenate([self.starts, np.full(len(contexts), self.written[0].end)])
        self.context_of_row = np.concatenate([self.context_of_row, contexts])
        self._place_rows()

    def keep(self, order: np.ndarray) -> None:
        moved = np.flatnonzero(order != np.arange(len(order)))
        for layer in self.written:
            layer.keep(len(order), torch.from_numpy(moved), torch.from_numpy(order[moved]))
        self.starts, self.context_of_row = self.starts[order], self.context_of_row[order]
        self._drop_unread()
        self._place_rows()

    def _fit(self, tokens: int) -> None:
        for context in self.contexts if self.longest is None else ():
            context.fit(tokens)

    def park(self, rows: np.ndarray, conversations: np.ndarray) -> None:
        """Keep what rows (int64 `[r]`) that are about to leave have read and generated, as contexts of conversations.

        Not the last token that was drawn for a row: the model has not read it.
        """
        contexts = self.context_of_row[rows]
        # The last row of a context takes it over, the others take copies.
        readers = np.bincount(self.context_of_row, minlength=len(self.lengths))
        takes_over = np.zeros(len(rows), dtype=bool)
        for place in np.flatnonzero(np.bincount(contexts, minlength=len(readers)) == readers):
            takes_over[np.flatnonzero(contexts == place)[-1:]] = True
        copied = contexts[~takes_over]
        if len(copied):
            copies = len(self.lengths) + np.arange(len(copied))
            for context in self.contexts:
                context.copy(torch.from_numpy(copies), torch.from_numpy(copied), int(self.lengths[copied].max()))
            self.lengths = np.concatenate([self.lengths, self.lengths[copied]])
            contexts[~takes_over] = copies
        generated = self.written[0].end - self.starts[rows]
        self._fit(int((self.lengths[contexts] + generated).max()))
        for count in np.unique(generated[generated > 0]):
            its = generated == count
            into, columns = contexts[its], self.lengths[contexts[its], None] + np.arange(count)
            source = torch.from_numpy(rows[its])
            for context, written in zip(self.contexts, self.written, strict=True):
                keys, values = (buffer[source, :, written.end - count : written.end] for buffer in written.buffers())
                context.write(torch.from_numpy(into), torch.from_numpy(columns), keys, values)
        self.lengths[contexts] += generated
        self.parked |= zip(conversations.tolist(), contexts.tolist(), strict=True)

    def forget(self, conversations: Collection[int]) -> None:
        """Drop parked contexts."""
        for conversation in conversations:
            del self.parked[conversation]
        if conversations:
            self._drop_unread()
            self._place_rows()

    def reading(self, conversations: Sequence[int], lengths: np.ndarray, new: int) -> dict[str, object]:
        """Return the further arguments of a forward that reads the last `new` tokens of parked conversations.

        Their keys and values are written to the parked contexts, those of tokens that had been read once more.

        Args:
            conversations: `n` of them.
            lengths: int64 `[n]`: tokens of each conversation, at least `new`.
            new: `T`.
        """
        contexts = np.array([self.parked[one] for one in conversations])
        self.lengths[contexts] = lengths
        self._fit(int(lengths.max()))
        layout = ContextKeys(self.contexts, contexts, lengths[:, None] - new + np.arange(new))
        return {"past_key_values": layout.past, "layout": layout}

    def resume(self, conversations: Sequence[int]) -> None:
        """Append a row for each of some parked conversations, which reads its context."""
        self._join(np.array([self.parked.pop(one) for one in conversations]))

    def _drop_unread(self) -> None:
        """Drop contexts that no row reads and that are not parked."""
        alive = np.bincount(self.context_of_row, minlength=len(self.lengths)) > 0
        alive[list(self.parked.values())] = True
        if alive.all():
            return
        order = fill_holes(alive)
        moved = np.flatnonzero(order != np.arange(len(order)))
        if len(moved):
            width = int(self.lengths[order[moved]].max())
            for layer in self.contexts:
                layer.copy(torch.from_numpy(moved), torch.from_numpy(order[moved]), width)
        self.lengths = self.lengths[order]
        place = np.empty(len(alive), dtype=np.int64)
        place[order] = np.arange(len(order))
        self.context_of_row = place[self.context_of_row]
        self.parked = {one: int(place[context]) for one, context in self.parked.items()}

    def _place_rows(self) -> None:
        """Number the rows of every context, and record which of its context's columns each row sees."""
        counts = np.bincount(self.context_of_row, minlength=len(self.lengths))
        by_context = np.argsort(self.context_of_row, kind="stable")
        within = np.empty_like(by_context)
        within[by_context] = np.arange(len(by_context)) - np.repeat(np.cumsum(counts) - counts, counts)
        self._within = within
        self._rows, self._places = places_of_rows(self.context_of_row, within, self._heads, len(self.lengths))
        longest = int(self.lengths.max(initial=0))
        self._unread = np.arange(longest) >= self.lengths[self.context_of_row, None]

    @property
    def _heads(self) -> int:
        return self.contexts[0].keys.shape[1]

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
            keys=[layer.keys[:g, :, :longest] for layer in self.contexts],
            values=[layer.values[:g, :, :longest] for layer in self.contexts],
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
        n, heads, longest = len(token), self._heads, self._unread.shape[1]
        shape = StepShape(
            padded_count(n, self.max_rows),
            padded_count(len(self.lengths), self.max_contexts),
            padded_columns(longest, self.contexts[0].columns),
            padded_columns(column + 1, self.written[0].columns),
        )
        # A padding row is one of a token that sees everything: nothing that it computes is infinite, or read.
        rows = np.zeros((4, shape.rows), dtype=np.int64)
        rows[2] = shape.longest
        rows[:, :n] = token, position, self.lengths[self.context_of_row], self.starts
        places = np.zeros(shape.rows * heads, dtype=np.int64)
        slots = np.zeros(shape.contexts * heads * self.rows_per_context, dtype=np.int64)
        found, places[: n * heads] = places_of_rows(
            self.context_of_row, self._within, heads, len(self.lengths), self.rows_per_context
        )
        slots[: len(found)] = found
        return shape, np.concatenate([rows.reshape(-1), [column], places, slots])

    def static_inputs(self, shape: StepShape, numbers: torch.Tensor) -> dict[str, Any]:
        """Return the forward's arguments, whose tensors are made of `numbers` on its device."""
        heads = self._heads
        slots = shape.contexts * heads * self.rows_per_context
        rows, column, places, by_context = numbers.split([4 * shape.rows, 1, shape.rows * heads, slots])
        token, position, length, start = rows.view(4, shape.rows)
        for layer in self.written:
            assert isinstance(layer, StaticLayer)
            layer.column, layer.shown = column, (shape.rows, shape.columns)
        of_context, of_row = (torch.arange(size, device=numbers.device) for size in (shape.longest, shape.columns))
        seen = torch.cat([of_context < length[:, None], (of_row >= start[:, None]) & (of_row <= column)], dim=1)
        layout = SharedKeys(
            keys=[layer.keys[: shape.contexts, :, : shape.longest] for layer in self.contexts],
            values=[layer.values[: shape.contexts, :, : shape.longest] for layer in self.contexts],
            rows=by_context,
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
    context_of_row: np.ndarray, within: np.ndarray, heads: int, contexts: int, most: int | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Return `SharedKeys.rows` and `SharedKeys.places`.

    Args:
        context_of_row: int64 `[n]`: each below `contexts`.
        within: int64 `[n]`: index of the row among those of its context.
        heads: number of key-value heads.
        contexts: `SharedKeys.g`.
        most: `SharedKeys.W`; None for the largest number of a context's rows.
    """
    most = int(within.max(initial=-1)) + 1 if most is None else most
    head = np.arange(heads)
    places = (context_of_row[:, None] * heads + head) * most + within[:, None]
    rows = np.zeros(contexts * heads * most, dtype=np.int64)
    rows[places] = np.arange(len(within))[:, None] * heads + head
    return rows, places.reshape(-1)
