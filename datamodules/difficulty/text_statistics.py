"""Counts of what stands in a question: how long it is, how many numbers and formulas it has.

A sentence encoder says what a question is about; how much there is to work through it says less well. On the recorded
pass rates these sixteen numbers alone forecast unseen questions nearly as well as a sentence encoder alone.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np

VERSION = "v1"
_NUMBER = re.compile(r"\d+")
_WORD = re.compile(r"[^\W\d_]{3,}")
_SENTENCE = re.compile(r"[.?!]")
_COUNTED = ("$", "\\", "\\frac", "\n", "=", ",", "^", "(")
_DIGITS = 12
WIDTH = 8 + len(_COUNTED)


def statistics(question: str) -> list[float]:
    """log(1 + x) of sizes and counts, and whether there is a `$` formula: `WIDTH` numbers."""
    numbers, words = _NUMBER.findall(question), _WORD.findall(question)
    sizes = [
        len(question),
        len(question.split()),
        len(_SENTENCE.findall(question)),
        len(numbers),
        max(map(len, numbers), default=0),
        max((int(number[:_DIGITS]) for number in numbers), default=0),
        sum(map(len, words)) / max(1, len(words)),
        *(question.count(mark) for mark in _COUNTED),
    ]
    return [*np.log1p(np.array(sizes, dtype=np.float64)), float("$" in question)]


def fill(out: np.ndarray, questions: Sequence[str]) -> None:
    """Writes the statistics of `questions` into `out` `[Q, WIDTH]`."""
    for row, question in enumerate(questions):
        out[row] = statistics(question)
