"""Rewards for the form of a completion: its pattern and its length."""

from __future__ import annotations

from app.rewards.answers import compiled, text_of
from app.rewards.base import Column, Reward, Scores, Texts, TokenIds
from datamodules.errors import UserError


class Format(Reward):
    """1 if a regular expression matches the whole completion, else 0.

    A completion begins where the prompt ends: where a chat template opens `<think>` itself, completions do not contain
    it. The run names a pattern that no completion has matched in ten steps.

    Args:
        pattern: regular expression; `.` also matches newlines. `(<think>)?.*?</think>.*` accepts both kinds of chat
            template.
        weight: factor of this reward in the optimised sum.
        correctness: whether difficulty, filters and accuracy refer to this reward.
        name: name in logged metrics.
    """

    one_by_one = True

    def __init__(self, pattern: str, weight: float = 1.0, correctness: bool = False, name: str | None = None) -> None:
        super().__init__(weight, correctness, name)
        self.pattern = compiled(pattern)

    def __call__(self, /, prompts: Texts, completions: Texts, completion_ids: TokenIds, **columns: Column) -> Scores:
        return [float(self.pattern.fullmatch(text_of(completion)) is not None) for completion in completions]


class SoftOverlong(Reward):
    """0 up to `max_completion_length - buffer` tokens, falling linearly to -1 at the limit, and -1 beyond it.

    DAPO, arXiv 2503.14476, equation 13, with `L_max` the limit and `L_cache` the buffer. Use it together with a
    correctness reward; difficulty never refers to it.

    Args:
        max_completion_length: number of tokens at which the penalty is full; usually that of `sampling`.
        buffer: number of tokens before the limit over which the penalty grows.
        weight: factor of this penalty in the optimised sum.
        name: name in logged metrics.
    """

    one_by_one = True

    def __init__(self, max_completion_length: int, buffer: int, weight: float = 1.0, name: str | None = None) -> None:
        super().__init__(weight, False, name)
        if not 0 < buffer <= max_completion_length:
            raise UserError(
                f"SoftOverlong has buffer={buffer} and max_completion_length={max_completion_length}, but needs "
                "0 < buffer <= max_completion_length. Change one of the two."
            )
        self.max_completion_length = max_completion_length
        self.buffer = buffer

    def __call__(self, /, prompts: Texts, completions: Texts, completion_ids: TokenIds, **columns: Column) -> Scores:
        free = self.max_completion_length - self.buffer
        return [max(min((free - len(ids)) / self.buffer, 0.0), -1.0) for ids in completion_ids]
