"""Answers compared as numbers or as strings."""

from __future__ import annotations

import re
from fractions import Fraction

from app.rewards.answers import AnswerReward, AnswerSpan
from datamodules.errors import UserError

# A sign is part of a number unless the sign subtracts from what precedes it.
NUMBER = re.compile(
    r"(?<![^\W_])(?<!\d\.)(?:(?<![\w)\]}])[-+])?"
    r"(?P<mantissa>(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+)"
    r"(?:[eE](?P<exponent>[-+]?\d+)(?!\w)|\s?/\s?(?P<denominator>\d+(?:\.\d+)?)(?![\d,/]))?"
)
MAX_DIGITS = 1000
"""Longer numbers are ignored: exact arithmetic on them would take seconds."""


def find_numbers(text: str) -> list[Fraction]:
    """Return all numbers in `text`, exactly: `-3`, `+2.50`, `1,234`, `3/4`, `1e-3`; a Unicode minus is a minus.

    `5-3` contains 5 and 3, `x=-3` contains -3. Numbers that are part of a word (`x2`), fractions over zero and numbers
    of more than `MAX_DIGITS` digits are ignored.
    """
    numbers = []
    for match in NUMBER.finditer(text.replace("\N{MINUS SIGN}", "-")):
        mantissa, exponent, denominator = match["mantissa"].replace(",", ""), match["exponent"], match["denominator"]
        if len(match[0]) > MAX_DIGITS or (exponent and (len(exponent) > 4 or abs(int(exponent)) > MAX_DIGITS)):
            continue
        value = Fraction(mantissa) * Fraction(10) ** int(exponent or 0)
        if denominator:
            if not Fraction(denominator):
                continue
            value /= Fraction(denominator)
        numbers.append(-value if match[0].startswith("-") else value)
    return numbers


class Numeric(AnswerReward):
    """1 if the number given as the answer equals the reference, else 0; None if the reference has no number.

    The answer is the last number of the completion; with `after`, the first number after the last `after`; with
    `pattern`, the last number of the match. `1,000`, `1000.0`, `+1000` and `2000/2` are the same number.

    Args:
        weight: factor of this reward in the optimised sum.
        correctness: whether this reward measures correctness; null decides by the other rewards (see `Reward`).
        name: name in logged metrics.
        gold: column with the reference answer (its last number counts), `a.b` for a nested one; by default `answer`,
            `solution` and the like.
        after: string before the answer, e.g. `####` or `=`; a completion without it scores 0.
        pattern: regular expression whose last match (its first group, if it has one) contains the answer.
        tolerance: largest accepted difference, relative to the reference where that exceeds 1 in absolute value.
    """

    def __init__(
        self,
        weight: float = 1.0,
        correctness: bool | None = None,
        name: str | None = None,
        gold: str | None = None,
        after: str = "",
        pattern: str = "",
        tolerance: float = 1e-6,
    ) -> None:
        super().__init__(weight, correctness, name, gold)
        if not 0 <= tolerance < float("inf"):
            raise UserError(f"tolerance is {tolerance}, which is not in [0, inf). Use 0 (exact) or a small number.")
        self.span = AnswerSpan(after, pattern)
        self.tolerance = Fraction(tolerance)

    def score(self, text: str, gold: list[str]) -> float | None:
        accepted = [numbers[-1] for numbers in map(find_numbers, gold) if numbers]
        if not accepted:
            return None
        found = find_numbers(self.span(text) or "")
        if not found:
            return 0.0
        given = found[0] if self.span.after else found[-1]
        return float(any(abs(given - right) <= self.tolerance * max(Fraction(1), abs(right)) for right in accepted))


class Exact(AnswerReward):
    """1 if the answer is one of the reference strings, else 0; None without a reference.

    Surrounding whitespace and a final full stop are ignored, and inner whitespace counts as one space.

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
        answer = self.span(text)
        return float(answer is not None and self._normal(answer) in {self._normal(right) for right in gold})

    def _normal(self, text: str) -> str:
        text = " ".join(text.split()).removesuffix(".").rstrip()
        return text.casefold() if self.ignore_case else text
