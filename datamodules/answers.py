r"""The one reader of reference answers: from what a data file holds to the answers that a reward accepts.

| in the file | accepted answers |
|---|---|
| `18`, `"18"` | `18` |
| `0.00005`, `2.5e22` (JSON numbers) | `0.00005`, `25000000000000000000000` |
| `72.0` | `72.0`, `72` (a column of integers with a gap is stored as floats) |
| `"2 * 9 = 18\n#### 1,018"` | `1018` (thousands separators only: `#### 3,5` stays `3,5`) |
| `"so $x = \\boxed{4}$"`, `\fbox{4}`, `\boxed 4` | `4` |
| `"$\\boxed{2}$ and $\\boxed{3}$"` | `\boxed{2}, \boxed{3}`: both, in any order |
| `["6", "7"]` | `6` or `7`; with the format "set" `\{6, 7\}`: both, in any order |
| `["$(1,2)$,$(2,1)$"]` with the format "set" (OlympiadBench) | `\{(1,2), (2,1)\}`: both, in any order |
| `{"a": 1}`, `true` | `{"a": 1}`, `true`: JSON text |
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from decimal import Decimal
from typing import Literal

import numpy as np

AnswerFormat = Literal["verbatim", "gsm8k", "boxed", "set"]

_BOX = re.compile(r"\\(?:f|frame)?box(?:ed)?\s*\{")
_BARE_BOX = re.compile(r"\\f?boxed\s+([^\s{}$.,]+)")
_BRACE = re.compile(r"\\.|[{}]", re.DOTALL)
_HASHES = re.compile(r"^#### *(.*?)\s*\Z", re.MULTILINE)
_THOUSANDS = re.compile(r"(?<![\d.,])\d{1,3}(?:,\d{3})+(?![\d,])")
_DOLLARS = re.compile(r"(?<!\\)\$")
_SPACE = r"(?:[\s$&]|\\[()\[\],;:! ]|\\q?quad)*"
_JOIN = re.compile(
    rf"{_SPACE}(?:(?:[,;]|\b(?:and|or)\b|\\text\{{\s*(?:and|or)\s*\}}|\\\\){_SPACE})*"
    rf"(?:\b(?:the|other|second|third|last|root|solution|value|is|one|also)\b{_SPACE})*"
    rf"(?:[A-Za-z](?:_\{{?\w+\}}?)?\s*(?:=|\\in)){{0,1}}{_SPACE}"
)
_MAX_JOIN = 60
"""Characters between two boxes that may belong to one answer."""


def extract(value: object, answer_format: AnswerFormat) -> object:
    """Return the reference answer in a column's value, with the type that it has in the file; None if it holds none.

    Text is cut to the answer in it. Text that is not in the given format is returned as it is, so that a mixed column
    loses nothing.
    """
    if answer_format == "set":
        value = _all_of(accepted(value))
    if not isinstance(value, str):
        return None if value is None or (isinstance(value, list) and not accepted(value)) else value
    found: str | None = None
    if answer_format == "gsm8k":
        found = gsm8k_answer(value)
    elif answer_format == "boxed":
        found = boxed_answer(value)
    reference = value if found is None else found
    return reference if reference.strip() else None


def accepted(value: object) -> list[str]:
    """Return the accepted answers that a value holds, as text (see the table above); an empty list if it holds none."""
    if isinstance(value, np.ndarray | np.generic):
        value = value.tolist()
    if value is None:
        return []
    if isinstance(value, list | tuple):
        return [answer for item in value for answer in accepted(item)]
    if isinstance(value, float):
        text = format(Decimal(repr(value)), "f")
        return list(dict.fromkeys([text, text.removesuffix(".0")]))
    if isinstance(value, bool | Mapping):
        return [json.dumps(value, ensure_ascii=False, default=str)]
    text, hashes, tail = str(value).rpartition("####")
    text = _without_separators(tail) if hashes else tail
    text = (boxed_answer(text) or text).strip()
    return [text] if text else []


def _all_of(answers: list[str]) -> str:
    """Return a set of all answers, and of all parts of an answer that commas outside of brackets separate."""
    parts, depth = [""], 0
    for char in _DOLLARS.sub("", ",".join(answers)):
        depth += (char in "([{") - (char in ")]}")
        if char == "," and depth <= 0:
            parts.append("")
        else:
            parts[-1] += char
    parts = [part.strip() for part in parts if part.strip()]
    return parts[0] if len(parts) == 1 else rf"\{{{', '.join(parts)}\}}" if parts else ""


def gsm8k_answer(text: str) -> str | None:
    """Return what follows `####` on the last line, without thousands separators (GSM8K, arXiv 2110.14168)."""
    found = _HASHES.search(text.rstrip())
    return _without_separators(found.group(1)).strip() if found else None


def boxed_answer(text: str) -> str | None:
    r"""Return the answer in the last box, or all boxes of one answer: `\boxed{2}, \boxed{3}`; None without a box."""
    contents = last_boxes(text)
    if len(contents) > 1:
        return ", ".join(rf"\boxed{{{content}}}" for content in contents)
    return contents[0] or None if contents else None


def last_boxes(text: str) -> list[str]:
    r"""Return the contents of the last `\boxed{...}` or `\fbox{...}`, as in MATH; an empty list without a box.

    Braces are balanced, ignoring escaped ones; a box that is not closed is none. Boxes before it that are joined to it
    by a comma, "and" or the like (`$\boxed{2}$ and $\boxed{3}$`) belong to the same answer and come first.
    """
    boxes = {box.end() - 1: box.start() for box in _BOX.finditer(text)}
    spans = [(bare.start(), bare.end(), bare.group(1)) for bare in _BARE_BOX.finditer(text)]
    open_braces: list[int] = []
    for brace in _BRACE.finditer(text):  # one pass, however deep the nesting
        if brace.group() == "{":
            open_braces.append(brace.start())
        elif brace.group() == "}" and open_braces:
            start = open_braces.pop()
            if start in boxes:
                spans.append((boxes[start], brace.end(), text[start + 1 : brace.start()]))
    contents: list[str] = []
    first = len(text)
    for start, end, content in sorted(spans, reverse=True):
        between = text[end:first] if 0 <= first - end <= _MAX_JOIN else None
        if contents and (not any(contents) or between is None or "\n\n" in between or not _JOIN.fullmatch(between)):
            break
        if content.strip() not in contents:
            contents.insert(0, content.strip())
        first = start
    return contents


def _without_separators(text: str) -> str:
    return _THOUSANDS.sub(lambda number: number.group().replace(",", ""), text)
