"""Extraction of reference answers from the formats that common data sets use."""

from __future__ import annotations

import re
from typing import Literal

AnswerFormat = Literal["verbatim", "gsm8k", "boxed"]

_BOX = re.compile(r"\\f?boxed\s*\{")
_BARE_BOX = re.compile(r"\\f?boxed\s+([^\s{}$.,]+)")
_BRACE = re.compile(r"\\.|[{}]", re.DOTALL)
_HASHES = re.compile(r"^#### *(.*?)\s*\Z", re.MULTILINE)


def extract(value: object, answer_format: AnswerFormat) -> str | list[str] | None:
    """Return the reference answer in a column's value, or None if it holds none.

    A value that is not in the given format is returned as it is, so that a mixed column loses nothing.
    """
    text = _to_text(value)
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
    """Return what follows `####` on the last line, without thousands separators (GSM8K, arXiv 2110.14168)."""
    found = _HASHES.search(text.rstrip())
    return found.group(1).replace(",", "").strip() if found else None


def last_boxed(text: str) -> str | None:
    r"""Return the contents of the last `\boxed{...}` with balanced braces (ignoring escaped ones), as in MATH."""
    boxes = {box.end() - 1 for box in _BOX.finditer(text)}
    last: tuple[int, int] | None = None
    open_braces: list[int] = []
    for brace in _BRACE.finditer(text):  # one pass, however deep the nesting
        if brace.group() == "{":
            open_braces.append(brace.start())
        elif brace.group() == "}" and open_braces:
            start = open_braces.pop()
            if start in boxes and (last is None or start > last[0]):
                last = start, brace.start()
    if last is not None:
        return text[last[0] + 1 : last[1]].strip()
    bare = _BARE_BOX.findall(text)
    return bare[-1] if bare else None


def _to_text(value: object) -> str | list[str] | None:
    """Return a value's text. A list stays a list unless it has one element (open-instruct wraps its ground truth)."""
    if isinstance(value, list):
        texts = [text for text in map(_to_text, value) if isinstance(text, str)]
        return texts[0] if len(texts) == 1 else texts or None
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, float) and value.is_integer():
        return str(int(value))  # a CSV column of integers with a gap is read as floats
    return str(value)
