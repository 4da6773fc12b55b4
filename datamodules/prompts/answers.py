"""Reference answers, as the usual data sets write them, brought to the text that a reward compares with."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any, Literal

AnswerFormat = Literal["verbatim", "gsm8k", "boxed"]

_BOX = re.compile(r"\\f?boxed\s*\{")
_BARE_BOX = re.compile(r"\\f?boxed\s+([^\s{}$.,]+)")
_BRACE = re.compile(r"\\.|[{}]", re.DOTALL)
_HASHES = re.compile(r"^#### *(.*?)\s*\Z", re.MULTILINE)


def extract(value: Any, answer_format: AnswerFormat) -> str | list[str] | None:
    """The reference answer in a column's value, or None where it holds none.

    A value that is not written in the given format is taken as it is, so that a mixed column loses nothing.
    """
    text = _plain(value)
    if not isinstance(text, str):
        return text
    found: str | None = None
    if answer_format == "gsm8k":
        found = gsm8k_answer(text)
    elif answer_format == "boxed":
        found = last_boxed(text)
    reference = text if found is None else found
    return reference if reference.strip() else None


def gsm8k_answer(text: str) -> str | None:
    """What follows `####` on the last line, without thousands separators (https://arxiv.org/abs/2110.14168, GSM8K)."""
    found = _HASHES.search(text.rstrip())
    return found.group(1).replace(",", "").strip() if found else None


def last_boxed(text: str) -> str | None:
    r"""Contents of the last `\boxed{...}` whose braces balance (escaped ones do not count), as in MATH."""
    braces = {box.end() - 1 for box in _BOX.finditer(text)}
    last = max((pair for pair in _pairs(text) if pair[0] in braces), default=None)
    if last is not None:
        return text[last[0] + 1 : last[1]].strip()
    bare = _BARE_BOX.findall(text)
    return bare[-1] if bare else None


def _pairs(text: str) -> Iterator[tuple[int, int]]:
    """Positions of every opening brace that is closed, and of the one that closes it; one pass, however deep."""
    open_braces: list[int] = []
    for brace in _BRACE.finditer(text):
        if brace.group() == "{":
            open_braces.append(brace.start())
        elif brace.group() == "}" and open_braces:
            yield open_braces.pop(), brace.start()


def _plain(value: Any) -> str | list[str] | None:
    """Text of a value; a list keeps its elements unless it has only one (open-instruct wraps its ground truth)."""
    if isinstance(value, list):
        texts = [text for text in map(_plain, value) if isinstance(text, str)]
        return texts[0] if len(texts) == 1 else texts or None
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, float) and value.is_integer():
        return str(int(value))  # a CSV column of integers with a gap in it is read as floats
    return str(value)
