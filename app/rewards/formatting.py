"""Whether a completion has the wanted form."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from app.rewards.answers import compiled, text_of
from app.rewards.base import Reward
from datamodules.types import Messages


class Format(Reward):
    """1 when a regular expression matches the whole completion, else 0.

    Args:
        pattern: regular expression; `.` matches newlines too. E.g. `<think>.*?</think>.*`.
        weight: factor of this reward in the sum that is optimised.
        correctness: whether difficulty, filters and accuracy are about this reward.
        name: under which it is logged.
    """

    def __init__(self, pattern: str, weight: float = 1.0, correctness: bool = False, name: str | None = None) -> None:
        super().__init__(weight, correctness, name)
        self.pattern = compiled(pattern)

    def __call__(
        self,
        prompts: Sequence[str | Messages],
        completions: Sequence[str | Messages],
        completion_ids: Sequence[list[int]],
        **columns: Any,
    ) -> list[float | None]:
        return [float(self.pattern.fullmatch(text_of(completion)) is not None) for completion in completions]
