"""Mathematical equivalence, by math-verify (https://github.com/huggingface/Math-Verify)."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from app.rewards.answers import gold_answers, text_of
from app.rewards.base import Reward
from datamodules.types import Messages


class Math(Reward):
    r"""1 when the last answer of a completion (`\boxed{}` first, then LaTeX, then plain numbers) equals the right one.

    None where the data has no right answer or one that cannot be read. math-verify's own timeouts are off, since they
    need signals in the main thread: the worker is killed instead.

    Args:
        weight: factor of this reward in the sum that is optimised.
        correctness: whether difficulty, filters and accuracy are about this reward.
        name: under which it is logged.
        gold: column with the right answer, `a.b` for a nested one; by default `answer`, `solution`, `ground_truth`,
            `reward_model.ground_truth` and the like. Text (`#### 18`, `\boxed{18}`), bare LaTeX or a list of these.
        require_boxed: whether only an answer in `\boxed{}` counts.
    """

    preload = ("math_verify",)

    def __init__(
        self,
        weight: float = 1.0,
        correctness: bool = False,
        name: str | None = None,
        gold: str | None = None,
        require_boxed: bool = False,
    ) -> None:
        super().__init__(weight, correctness, name)
        self.gold = gold
        self.require_boxed = require_boxed

    def load(self) -> None:
        import math_verify

        logging.getLogger("math_verify").setLevel(logging.ERROR)
        math_verify.parse("$1$", parsing_timeout=None)  # builds its grammars

    def __call__(
        self,
        prompts: Sequence[str | Messages],
        completions: Sequence[str | Messages],
        completion_ids: Sequence[list[int]],
        **columns: Any,
    ) -> list[float | None]:
        cache: dict[tuple[str, ...], list[Any]] = {}
        scores: list[float | None] = []
        answers = gold_answers(columns, len(completions), self.gold)
        for completion, accepted in zip(completions, answers, strict=True):
            key = tuple(accepted)
            if key not in cache:
                cache[key] = [expression for answer in accepted for expression in _parse_gold(answer)]
            scores.append(self._score(text_of(completion), cache[key]))
        return scores

    def _score(self, text: str, gold: list[Any]) -> float | None:
        import math_verify

        if not gold:
            return None
        if self.require_boxed:
            if r"\boxed" not in text:
                return 0.0
            text = text[text.rindex(r"\boxed") :]
        answer = math_verify.parse(text, parsing_timeout=None)
        return float(math_verify.verify(gold, answer, timeout_seconds=None))


def _parse_gold(answer: str) -> list[Any]:
    """Expressions of a right answer. Bare LaTeX is not found in running text, so it is put between dollars."""
    import math_verify

    bare = "$" not in answer and r"\boxed" not in answer and r"\(" not in answer and r"\[" not in answer
    return math_verify.parse(f"${answer}$" if bare else answer, parsing_timeout=None)
