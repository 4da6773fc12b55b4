"""Mathematical answers, compared strictly by default, or as math-verify does."""

from __future__ import annotations

import logging
import re
from functools import lru_cache

from app.rewards import equality
from app.rewards.answers import AnswerReward
from app.rewards.numbers import plain_symbols, spans
from datamodules.answers import boxed_answer, last_boxes

_CUE = re.compile(r"\banswer\b\s*(?:is|are|:|=)\s*:?|####", re.IGNORECASE)
_MATH = re.compile(
    r"\$\$(.+?)\$\$|\\\[(.+?)\\\]|\\\((.+?)\\\)|(?<![\\$])\$(?![\s$])([^$\n]*?[^$\n\s\\])\$(?!\d)", re.DOTALL
)
_SENTENCE = re.compile(r"\s*(.{1,200}?)(?:[.!?]?\s*$|[.!?]\s|\n)")
_LINE = re.compile(r"\s*(\S.{0,200}?)[.!?]?\s*")
_TAIL = 4000
"""Characters at the end of a completion in which an answer without a box is looked for."""


class Math(AnswerReward):
    r"""1 if the answer of a completion equals the reference, else 0; None where the data has no reference answer.

    The answer is the content of the last `\boxed{}` or `\fbox{}` (of several that are joined by "and" or a comma, all),
    else what follows the last "answer is" or `####`, else the last formula in dollars or the last number. Where a
    completion closes a think block, only what follows it counts.

    `app.rewards.equality` has the rules of comparison as a table. With `strict: false`, math-verify
    (https://github.com/huggingface/Math-Verify) finds and compares the answers: letters multiply (`CAB` is `ABC`),
    floats are rounded to six decimals, a list in any order is a set.

    Args:
        weight: factor of this reward in the optimised sum.
        correctness: whether this reward measures correctness; null decides by the other rewards (see `Reward`).
        name: name in logged metrics.
        gold: column with the reference answer, `a.b` for a nested one; by default `answer`, `solution`,
            `ground_truth`, `reward_model.ground_truth` and the like. It holds text (`#### 18`, `\boxed{18}`), bare
            LaTeX, a number, or a list of these, of which one suffices.
        require_boxed: accept only an answer in a box.
        strict: compare strictly.
    """

    preload = ("math_verify", "sympy.physics.units")

    def __init__(
        self,
        weight: float = 1.0,
        correctness: bool | None = None,
        name: str | None = None,
        gold: str | None = None,
        require_boxed: bool = False,
        strict: bool = True,
    ) -> None:
        super().__init__(weight, correctness, name, gold)
        self.require_boxed = require_boxed
        self.strict = strict

    def load(self) -> None:
        import math_verify

        logging.getLogger("math_verify").setLevel(logging.ERROR)
        math_verify.parse("$1$", parsing_timeout=None)  # builds its grammars

    def can_read(self, gold: str) -> bool:
        return bool(equality.read(gold) if self.strict else _parse_gold(gold))

    def score(self, text: str, gold: list[str]) -> float | None:
        if not self.strict:
            text = text.rpartition("</think>")[2]
            boxes = [box for box in last_boxes(text) if box]
            return _loose_score(
                " and ".join(rf"\boxed{{{box}}}" for box in boxes) if self.require_boxed else text, gold
            )
        accepted = [answer for answer in map(equality.read, gold) if answer is not None]
        if not accepted:
            return None
        found = self.extract(text)
        given = equality.read(found) if found else None
        return float(given is not None and any(equality.same(right, given) for right in accepted))

    def extract(self, text: str) -> str | None:
        text = text.rpartition("</think>")[2]
        return boxed_answer(text) if self.require_boxed or any(last_boxes(text)) else _unboxed(text[-_TAIL:])


def _unboxed(text: str) -> str | None:
    """Return the answer in running text without a box; None if there is none."""
    cues = list(_CUE.finditer(text))
    tail = text[cues[-1].end() :] if cues else text
    formulas = list(_MATH.finditer(tail))
    sentence = _SENTENCE.match(tail) if cues else _LINE.fullmatch(tail)
    if sentence and not formulas and _is_answer(equality.read(sentence[1])):
        return sentence[1]
    plain = plain_symbols(_MATH.sub(lambda formula: " " * len(formula[0]), tail))
    found = [(match.start(), next(filter(None, match.groups()))) for match in formulas]
    found += [(match.start(), match[0]) for match in spans(plain)]
    if not found:
        return None
    return (min(found) if cues else max(found))[1]


def _is_answer(answer: equality.Answer | None) -> bool:
    """Return whether a sentence as a whole is an answer, rather than text around one."""
    match answer:
        case equality.Quantity():
            return answer.number is not None or " " not in answer.text
        case equality.Words():
            return answer.words.isalpha() or ":" in answer.words or not re.search(r"\d", answer.words)
        case equality.Named():
            return _is_answer(answer.value)
        case equality.Group():
            return answer.kind != "" or all(map(_is_answer, answer.items))
    return answer is not None


def _loose_score(text: str, gold: list[str]) -> float | None:
    import math_verify

    accepted = [expression for answer in gold for expression in _parse_gold(answer)]
    if not accepted:
        return None
    given = math_verify.parse(text[-_TAIL:], parsing_timeout=None) if equality.is_bounded(text[-_TAIL:]) else []
    return float(math_verify.verify(accepted, given, timeout_seconds=None))


@lru_cache(maxsize=256)
def _parse_gold(answer: str) -> tuple[object, ...]:
    """Parse a reference answer. Bare LaTeX is wrapped in dollars, since math-verify ignores it in running text.

    The result is kept because the completions of a group share their answer.
    """
    import math_verify

    if not equality.is_bounded(answer):
        return ()
    bare = (
        "$" not in answer.replace(r"\$", "") and r"\boxed" not in answer and r"\(" not in answer and r"\[" not in answer
    )
    return tuple(math_verify.parse(f"${answer}$" if bare else answer, parsing_timeout=None))
