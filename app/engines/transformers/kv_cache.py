"""Key-value caches whose rows come and go while other rows are being decoded."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, cast

import numpy as np
import torch
from transformers import Cache, DynamicCache


class PrefilledCache(DynamicCache):
    """The model's own cache, with keys in the dtype of values.

    Under autocast many models rotate keys in float32, which the attention casts for every token, and values with them.
    """

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return super().update(key_states.to(value_states.dtype), value_states, layer_idx, *args, **kwargs)


class RowCache(ABC):
    """The cache interface of the decoding loop, with each row's first column.

    Attributes:
        past: passed to the model as `past_key_values`.
        starts: int64 `[rows]`: the first column of each row; earlier columns are padding.
        can_join: True if rows may be admitted while others are being decoded.
        attention: attention implementation that the model's forward needs with this cache; None for the model's own.
    """

    past: Cache
    can_join: bool
    attention: str | None = None

    def __init__(self) -> None:
        self.starts = np.zeros(0, dtype=np.int64)

    @abstractmethod
    def admit(self, prefilled: Cache, source: np.ndarray, lengths: np.ndarray) -> None:
        """Append one row per entry of `source` (a row of `prefilled`), whose prompt has `lengths` tokens."""

    @abstractmethod
    def keep(self, order: np.ndarray) -> None:
        """Keep `len(order)` rows: row i becomes the former row `order[i]`."""

    @abstractmethod
    def inputs(self, device: torch.device) -> dict[str, object]:
        """Prepare one more column and return the forward's further arguments for the next token."""


class GrowingCache(RowCache):
    """The model's own cache, for layers of any kind (sliding, linear). Rows can only join it when it is empty."""

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

    def inputs(self, device: torch.device) -> dict[str, object]:
        self._end += 1
        mask = None
        if (self.starts > 0).any():
            starts = torch.from_numpy(self.starts).to(device)
            mask = (torch.arange(self._end, device=device) >= starts[:, None]).long()
        return {"past_key_values": self.past, "attention_mask": mask}


def _row_numbers(rows: np.ndarray) -> torch.LongTensor:
    return cast(torch.LongTensor, torch.from_numpy(rows))
