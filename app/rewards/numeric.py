"""Answers compared as numbers or as strings."""

from __future__ import annotations

import re
from fractions import Fraction
from functools import lru_cache

from app.rewards import equality
from app.rewards.answers import AnswerReward, AnswerSpan
from app.rewards.numbers import Number, find_numbers
from datamodules.answers import boxed_answer
from datamodules.errors import UserError

_SENTENCE = re.compile(r"(?<![A-Za-z\\])[A-Za-z]{2,}[^\\_^=]*[ :]")
"""Text around a number, rather than a formula that holds one."""

_MOST_SHOWN = 10**1000
"""Largest number that is logged: Python writes no integers of more than 4300 digits."""


class Numeric(AnswerReward):
    """1 if the number given as the answer equals the reference, else 0; None if the reference is not a number.

    The answer is the last number of the completion; with `after`, the first number after the last `after`; with
    `pattern`, the last number of the match. `1,000`, `1000.0`, `+1000` and `2000/2` are the same number, and so are
    `1 1/2` and `1.5`. Units, currency and percent signs are ignored: `12 km^2` is 12. A reference is one number or
    a text whose last number counts; formulas, lists (`3,5`) and numbers in another base are none.

    Args:
        weight: factor of this reward in the optimised sum.
        correctness: whether this reward measures correctness; null decides by the other rewards (see `Reward`).
        name: name in logged metrics.
        gold: column with the reference answer (its last number counts), `a.b` for a nested one; by default `answer`,
            `solution` and the like.
        after: string before the answer, e.g. `####` or `=`; a completion without it scores 0.
        pattern: regular expression whose last match (its first group, if it has one) contains the answer.
        tolerance: largest accepted difference, relative to the reference. By default integers and fractions are exact,
            and decimals may be rounded (1e-6 relative, and one unit of the last place that is written).
    """

    def __init__(
        self,
        weight: float = 1.0,
        correctness: bool | None = None,
        name: str | None = None,
        gold: str | None = None,
        after: str = "",
        pattern: str = "",
        tolerance: float | None = None,
    ) -> None:
        super().__init__(weight, correctness, name, gold)
        if tolerance is not None and not 0 <= tolerance < float("inf"):
            raise UserError(f"tolerance is {tolerance}, which is not in [0, inf). Use 0 (exact) or a small number.")
        self.span = AnswerSpan(after, pattern)
        self.tolerance = None if tolerance is None else Fraction(tolerance)

    def can_read(self, gold: str) -> bool:
        return _reference(gold) is not None

    def score(self, text: str, gold: list[str]) -> float | None:
        references = [number for number in map(_reference, gold) if number is not None]
        if not references:
            return None
        given = self._given(text)
        if given is None:
            return 0.0
        if self.tolerance is None:
            return float(any(right.equals(given) for right in references))
        return float(any(abs(given.value - one.value) <= self.tolerance * abs(one.value) for one in references))

    def extract(self, text: str) -> str | None:
        given = self._given(text)
        return None if given is None or abs(given.value) > _MOST_SHOWN else str(given.value)

    def _given(self, text: str) -> Number | None:
        found = find_numbers(self.span(text) or "")
        return None if not found else found[0] if self.span.after else found[-1]


@lru_cache(maxsize=1024)
def _reference(text: str) -> Number | None:
    """Return the number that a reference answer is, or the last one in its text; None if it is something else."""
    answer = equality.read(text)
    while isinstance(answer, equality.Named):
        answer = answer.value
    if isinstance(answer, equality.Quantity) and answer.number is not None:
        return answer.number
    in_text = isinstance(answer, equality.Quantity | equality.Words) and _SENTENCE.search(text)
    found = find_numbers(text) if in_text else []
    return found[-1] if found else None


class Exact(AnswerReward):
    """1 if the answer is one of the reference strings, else 0; None without a reference.

    Surrounding whitespace, a box and a final full stop are ignored, and inner whitespace counts as one space.

    Args:
        weight: factor of this reward in the optimised sum.
        correctness: whether this reward measures correctness; null decides by the other rewards (see `Reward`).
        name: name in logged metrics.
        gold: column with the reference answer, `a.b` for a nested one; by default `answer`, `solution` and the like.
        after: string before the answer, e.g. `####` or `=`; by default the whole completion is the answer.
        pattern: regular expression whose last match (its first group, if it has one) is the answer.
        ignore_case: whether `Yes` equals `yes`.
    """

    def __init__(
        self,
        weight: float = 1.0,
        correctness: bool | None = None,
        name: str | None = None,
        gold: str | None = None,
        after: str = "",
        pattern: str = "",
        ignore_case: bool = True,
    ) -> None:
        super().__init__(weight, correctness, name, gold)
        self.span = AnswerSpan(after, pattern)
        self.ignore_case = ignore_case

    def score(self, text: str, gold: list[str]) -> float | None:
        if not gold:
            return None
        answer = self.extract(text)
        return float(answer is not None and answer in {self._normal(right) for right in gold})

    def extract(self, text: str) -> str | None:
        answer = self.span(text)
        return None if answer is None else self._normal(answer)

    def _normal(self, text: str) -> str:
        if text.strip().startswith((r"\boxed", r"\fbox")):
            text = boxed_answer(text) or text
        text = " ".join(text.split()).removesuffix(".").rstrip()
        return text.casefold() if self.ignore_case else text
