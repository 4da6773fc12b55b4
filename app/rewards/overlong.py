"""A soft penalty for completions that come near the length limit."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from app.rewards.base import Reward
from datamodules.errors import UserError
from datamodules.types import Messages


class SoftOverlong(Reward):
    """0 up to `max_completion_length - buffer` tokens, from there linearly down to -1 at the limit, and -1 beyond it.

    DAPO, arXiv 2503.14476, equation 13, with `L_max` the limit and `L_cache` the buffer. Add it beside a correctness
    reward; it is never the reward that difficulty is about.

    Args:
        max_completion_length: tokens at which the penalty is whole; usually that of `sampling`.
        buffer: tokens before the limit over which it grows.
        weight: factor of this penalty in the sum that is optimised.
        name: under which it is logged.
    """

    def __init__(self, max_completion_length: int, buffer: int, weight: float = 1.0, name: str | None = None) -> None:
        super().__init__(weight, False, name)
        if not 0 < buffer <= max_completion_length:
            raise UserError(
                f"SoftOverlong(max_completion_length={max_completion_length}, buffer={buffer}): expected "
                "0 < buffer <= max_completion_length"
            )
        self.max_completion_length = max_completion_length
        self.buffer = buffer

    def __call__(
        self,
        prompts: Sequence[str | Messages],
        completions: Sequence[str | Messages],
        completion_ids: Sequence[list[int]],
        **columns: Any,
    ) -> list[float | None]:
        free = self.max_completion_length - self.buffer
        return [max(min((free - len(ids)) / self.buffer, 0.0), -1.0) for ids in completion_ids]
