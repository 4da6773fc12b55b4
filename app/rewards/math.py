"""Mathematical equivalence, checked by math-verify (https://github.com/huggingface/Math-Verify)."""

from __future__ import annotations

import logging
from functools import lru_cache

from app.rewards.answers import AnswerReward


class Math(AnswerReward):
    r"""1 if the last answer of a completion (`\boxed{}` first, then LaTeX, then plain numbers) equals the reference.

    None where the data has no reference answer or an unreadable one. math-verify's own timeouts need signals in the
    main thread, so they are off: a worker that takes too long is killed.

    Args:
        weight: factor of this reward in the optimised sum.
        correctness: whether this reward measures correctness; null decides by the other rewards (see `Reward`).
        name: name in logged metrics.
        gold: column with the reference answer, `a.b` for a nested one; by default `answer`, `solution`,
            `ground_truth`, `reward_model.ground_truth` and the like. It holds text (`#### 18`, `\boxed{18}`), bare
            LaTeX, or a list of these.
        require_boxed: accept only an answer in `\boxed{}`.
    """

    preload = ("math_verify",)

    def __init__(
        self,
        weight: float = 1.0,
        correctness: bool | None = None,
        name: str | None = None,
        gold: str | None = None,
        require_boxed: bool = False,
    ) -> None:
        super().__init__(weight, correctness, name, gold)
        self.require_boxed = require_boxed

    def load(self) -> None:
        import math_verify

        logging.getLogger("math_verify").setLevel(logging.ERROR)
        math_verify.parse("$1$", parsing_timeout=None)  # builds its grammars

    def score(self, text: str, gold: list[str]) -> float | None:
        import math_verify

        accepted = [expression for answer in gold for expression in parse_gold(answer)]
        if not accepted:
            return None
        if self.require_boxed:
            if r"\boxed" not in text:
                return 0.0
            text = text[text.rindex(r"\boxed") :]
        answer = math_verify.parse(text, parsing_timeout=None)
        return float(math_verify.verify(accepted, answer, timeout_seconds=None))


@lru_cache(maxsize=256)
def parse_gold(answer: str) -> tuple[object, ...]:
    """Parse a reference answer. Bare LaTeX is wrapped in dollars, since math-verify ignores it in running text.

    The result is kept because the completions of a group share their answer.
    """
    import math_verify

    bare = "$" not in answer and r"\boxed" not in answer and r"\(" not in answer and r"\[" not in answer
    return tuple(math_verify.parse(f"${answer}$" if bare else answer, parsing_timeout=None))
