"""Answers compared as numbers or as strings."""

from __future__ import annotations

import re
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

from app.rewards.answers import AnswerSpan, gold_answers, text_of
from app.rewards.base import Reward
from datamodules.errors import UserError
from datamodules.types import Messages

# A sign belongs to a number unless something stands before it from which it could subtract.
NUMBER = re.compile(
    r"(?<![^\W_])(?<!\d\.)(?:(?<![\w)\]}])[-+])?"
    r"(?P<mantissa>(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+)"
    r"(?:[eE](?P<exponent>[-+]?\d+)(?!\w)|\s?/\s?(?P<denominator>\d+(?:\.\d+)?)(?![\d,/]))?"
)
MAX_DIGITS = 1000
"""A longer number is no answer; exact arithmetic on it would cost seconds."""


def find_numbers(text: str) -> list[Fraction]:
    """All numbers in `text`, exactly: `-3`, `+2.50`, `1,234`, `3/4`, `1e-3`; a Unicode minus counts as a minus.

    `5-3` holds 5 and 3, `x=-3` holds -3. Numbers that are part of a word (`x2`) do not count, nor do fractions over
    zero and numbers of more than `MAX_DIGITS` digits.
    """
    numbers = (_value(match) for match in NUMBER.finditer(text.replace("\N{MINUS SIGN}", "-")))
    return [number for number in numbers if number is not None]


def _value(match: re.Match[str]) -> Fraction | None:
    mantissa, exponent, denominator = match["mantissa"].replace(",", ""), match["exponent"], match["denominator"]
    if len(match[0]) > MAX_DIGITS or (exponent and (len(exponent) > 4 or abs(int(exponent)) > MAX_DIGITS)):
        return None
    value = Fraction(mantissa) * Fraction(10) ** int(exponent or 0)
    if denominator:
        if not Fraction(denominator):
            return None
        value /= Fraction(denominator)
    return -value if match[0].startswith("-") else value


class Numeric(Reward):
    """1 when the number that a completion answers with equals the right one, else 0; None without a right number.

    The answer is the last number of the completion; with `after`, the first number behind the last `after`; with
    `pattern`, the last number of what it extracts. `1,000`, `1000.0`, `+1000` and `2000/2` are the same number.

    Args:
        weight: factor of this reward in the sum that is optimised.
        correctness: whether difficulty, filters and accuracy are about this reward.
        name: under which it is logged.
        gold: column with the right answer (its last number counts), `a.b` for a nested one; by default `answer`,
            `solution` and the like.
        after: string that comes before the answer, e.g. `####` or `=`; a completion without it scores 0.
        pattern: regular expression whose last match (its first group, if it has one) holds the answer.
        tolerance: largest accepted difference, relative to the right answer where that is above 1 in size.
    """

    def __init__(
        self,
        weight: float = 1.0,
        correctness: bool = False,
        name: str | None = None,
        gold: str | None = None,
        after: str = "",
        pattern: str = "",
        tolerance: float = 1e-6,
    ) -> None:
        super().__init__(weight, correctness, name)
        if not 0 <= tolerance < float("inf"):
            raise UserError(f"tolerance={tolerance}: expected 0 (exact) or a small positive number")
        self.gold = gold
        self.span = AnswerSpan(after, pattern)
        self.tolerance = Fraction(tolerance)

    def __call__(
        self,
        prompts: Sequence[str | Messages],
        completions: Sequence[str | Messages],
        completion_ids: Sequence[list[int]],
        **columns: Any,
    ) -> list[float | None]:
        answers = gold_answers(columns, len(completions), self.gold)
        return [self._score(text_of(text), gold) for text, gold in zip(completions, answers, strict=True)]

    def _score(self, text: str, gold: list[str]) -> float | None:
        accepted = [numbers[-1] for numbers in map(find_numbers, gold) if numbers]
        if not accepted:
            return None
        found = find_numbers(self.span(text) or "")
        if not found:
            return 0.0
        given = found[0] if self.span.after else found[-1]
        return float(any(abs(given - right) <= self.tolerance * max(Fraction(1), abs(right)) for right in accepted))


class Exact(Reward):
    """1 when the answer is the right string, else 0; None without a right answer.

    Both are compared without surrounding white space and final full stop, with inner white space as one blank.

    Args:
        weight: factor of this reward in the sum that is optimised.
        correctness: whether difficulty, filters and accuracy are about this reward.
        name: under which it is logged.
        gold: column with the right answer, `a.b` for a nested one; by default `answer`, `solution` and the like.
        after: string that comes before the answer, e.g. `####` or `=`; by default the whole completion is the answer.
        pattern: regular expression whose last match (its first group, if it has one) is the answer.
        ignore_case: whether `Yes` equals `yes`.
    """

    def __init__(
        self,
        weight: float = 1.0,
        correctness: bool = False,
        name: str | None = None,
        gold: str | None = None,
        after: str = "",
        pattern: str = "",
        ignore_case: bool = True,
    ) -> None:
        super().__init__(weight, correctness, name)
        self.gold = gold
        self.span = AnswerSpan(after, pattern)
        self.ignore_case = ignore_case

    def __call__(
        self,
        prompts: Sequence[str | Messages],
        completions: Sequence[str | Messages],
        completion_ids: Sequence[list[int]],
        **columns: Any,
    ) -> list[float | None]:
        answers = gold_answers(columns, len(completions), self.gold)
        return [self._score(text_of(text), gold) for text, gold in zip(completions, answers, strict=True)]

    def _score(self, text: str, gold: list[str]) -> float | None:
        if not gold:
            return None
        answer = self.span(text)
        return float(answer is not None and self._normal(answer) in {self._normal(right) for right in gold})

    def _normal(self, text: str) -> str:
        text = " ".join(text.split()).removesuffix(".").rstrip()
        return text.casefold() if self.ignore_case else text
