"""Attention of new tokens over contexts that have been read: one token per row, or the last ones of each context."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, Cache
from transformers.cache_utils import CacheLayerMixin

from app.engines.transformers.cache_layers import ContextLayer
from app.objective.shared_prompt import UNSUPPORTED, unsupported

DECODE = "dots_decode"


@dataclass(frozen=True, slots=True, eq=False)
class SharedKeys:
    """Keys and values of `g` contexts that `n` rows read, at most `W` rows per context.

    One matrix product per context serves all its rows, so that its keys and values are read only once. Key-value heads
    are never repeated for the query heads that share them.

    Attributes:
        keys: per layer, `[g, key_value_heads, P, head_dim]`.
        values: per layer, same shape as `keys`.
        rows: int64 `[g * key_value_heads * W]`: the row and head (`row * key_value_heads + head`) in each slot of each
            head of each prompt; any row where a prompt has fewer than `W`.
        places: int64 `[n * key_value_heads]`: the slot of each head of each row.
        bias: float `[n, 1, P + T]`, minus infinity where a row sees nothing; None if every row sees everything.
    """

    keys: Sequence[Tensor]
    values: Sequence[Tensor]
    rows: Tensor
    places: Tensor
    bias: Tensor | None

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """Return the attention output `[n, 1, heads, head_dim]`.

        Args:
            layer: index of the layer.
            query: `[n, heads, 1, head_dim]`.
            key: `[n, key_value_heads, T, head_dim]`: the rows' own tokens up to the new one.
            value: same shape as `key`.
            scale: factor of the dot products.
        """
        rows, heads, _, width = query.shape
        query = query[:, :, 0] * scale
        read_keys, read_values = self.keys[layer], self.values[layer]
        groups = len(read_keys) * read_keys.shape[1]
        read = torch.bmm(self._by_context(_by_head(query, key), groups), read_keys.flatten(0, 1).mT)
        written = torch.bmm(_by_head(query, key), key.flatten(0, 1).mT)
        scores = torch.cat([self._by_row(read, heads // key.shape[1]), written], dim=2).view(rows, heads, -1)
        if self.bias is not None:
            scores += self.bias
        # A softmax of half precision is summed in float32 and rounded once; autocast would cast around it.
        with torch.autocast(scores.device.type, enabled=False):
            weights = scores.softmax(dim=2).to(value.dtype)
        on_read, on_written = _by_head(weights, key).split([read.shape[2], written.shape[2]], dim=2)
        read = torch.bmm(self._by_context(on_read, groups), read_values.flatten(0, 1))
        output = torch.baddbmm(self._by_row(read, heads // key.shape[1]), on_written, value.flatten(0, 1))
        return output.view(rows, 1, heads, width)

    def _by_context(self, states: Tensor, groups: int) -> Tensor:
        """Regroup `[n * key_value_heads, repeats, X]` to `[g * key_value_heads, W * repeats, X]`."""
        return states.index_select(0, self.rows).view(groups, -1, states.shape[2])

    def _by_row(self, states: Tensor, repeats: int) -> Tensor:
        """Invert `_by_context`."""
        return states.view(-1, repeats, states.shape[2]).index_select(0, self.places)


def _by_head(states: Tensor, keys: Tensor) -> Tensor:
    """Group the query heads of `[n, heads, X]` that share a key-value head: `[n * key_value_heads, repeats, X]`."""
    return states.reshape(len(states) * keys.shape[1], -1, states.shape[2])


class ContextKeys:
    """Keys and values of contexts that a forward reads while it writes those of their last tokens.

    Args:
        layers: the model's.
        contexts: int64 `[n]`: places of the contexts.
        positions: int64 `[n, T]`: of the tokens that are read, ascending; the context ends with the last.

    Attributes:
        past: passed to the model as `past_key_values`; its layers write to the contexts.
    """

    def __init__(self, layers: Sequence[ContextLayer], contexts: np.ndarray, positions: np.ndarray) -> None:
        device, first, self.layers = layers[0].keys.device, int(contexts[0]), layers
        written = torch.from_numpy(contexts).to(device)
        self.longest = int(positions.max()) + 1
        adjacent = (contexts == first + np.arange(len(contexts))).all()
        self.contexts = slice(first, first + len(contexts)) if adjacent else written
        columns = torch.from_numpy(positions).to(device)
        self.seen = torch.arange(self.longest, device=device) <= columns[:, :, None]
        self.past = Cache(layers=[_WritingLayer(layer, written, columns) for layer in layers])

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """Return the attention output `[n, T, heads, head_dim]`.

        Args:
            layer: index of the layer.
            query: `[n, heads, T, head_dim]`.
            key: `[n, key_value_heads, T, head_dim]`, which has been written.
            value: same shape as `key`.
            scale: factor of the dot products.
        """
        keys, values = (buffer[self.contexts, :, : self.longest] for buffer in self.layers[layer].buffers())
        # Repeated for the query heads that share them, which takes less memory than a mask that is repeated.
        shared = query.shape[1] // key.shape[1]
        keys, values = (one[:, :, None].expand(-1, -1, shared, -1, -1).flatten(1, 2) for one in (keys, values))
        output = scaled_dot_product_attention(
            query.to(keys.dtype), keys, values, attn_mask=self.seen[:, None], scale=scale
        )
        return output.transpose(1, 2)


class _WritingLayer(CacheLayerMixin):
    """Writes the states of tokens to contexts, where `ContextKeys.attend` finds them."""

    is_sliding = False

    def __init__(self, layer: ContextLayer, contexts: Tensor, columns: Tensor) -> None:
        super().__init__()
        self.layer, self.contexts, self.columns = layer, contexts, columns

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Do nothing: the buffers are there."""

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        self.layer.write(self.contexts, self.columns, key_states, value_states)
        return key_states, value_states

    def get_seq_length(self) -> int:
        return int(self.columns.min())

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.get_seq_length() + query_length, 0

    def get_max_length(self) -> int:
        return self.layer.columns


def decode_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    layout: SharedKeys | ContextKeys | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Compute the layout's `attend` under the signature that transformers calls.

    Raises:
        ValueError: the model needs something that this attention does not do, or `layout` did not reach it.
    """
    if layout is None or attention_mask is not None or any(others.get(name) is not None for name in UNSUPPORTED):
        given = {**others, "layout": layout, "attention_mask": attention_mask}
        raise unsupported(module, given, "model.engine.init_args.share_prompts")
    scale = query.shape[3] ** -0.5 if scaling is None else scaling
    return layout.attend(int(module.layer_idx), query, key, value, scale), None  # type: ignore[arg-type]


AttentionInterface.register(DECODE, decode_attention)
