"""What the model answered, and what it should have answered."""

from __future__ import annotations

import json
import re
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from datamodules.errors import UserError, nearest
from datamodules.types import Messages

GOLD_COLUMNS = (
    "answer",
    "solution",
    "ground_truth",
    "reward_model.ground_truth",
    "reward_spec.ground_truth",
    "expected_answer",
    "label",
    "output",
)
"""Where the usual schemas keep the right answer, in the order in which they are looked for."""


def text_of(completion: str | Messages) -> str:
    """The text of a completion, conversational or not."""
    return completion if isinstance(completion, str) else str(completion[-1]["content"])


def plain(value: Any) -> Any:
    """`value` with arrays, array scalars and mappings turned into lists, numbers and dicts, at any depth."""
    if isinstance(value, np.ndarray):
        return plain(value.tolist())
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(map(plain, value)) if type(value) in (list, tuple) else [plain(item) for item in value]
    return value


class AnswerSpan:
    """Which part of a completion is its answer.

    Both are plain strings, empty for none: a command line reads an optional string as YAML, and `####` as a comment.

    Args:
        after: the answer is the text behind the last occurrence of this string; a completion without it has none.
        pattern: or: the answer is the last match of this regular expression (`.` matches newlines too), its first
            group when it has one; a completion without a match has no answer.

    Raises:
        UserError: both are given, or `pattern` is no regular expression.
    """

    def __init__(self, after: str, pattern: str) -> None:
        if after and pattern:
            raise UserError(f"after={after!r} and pattern={pattern!r}: expected one of the two; remove the other")
        self.after = after
        self.pattern = compiled(pattern) if pattern else None

    def __call__(self, text: str) -> str | None:
        """The answer within `text`, the whole of it when neither option is set; None when there is none."""
        if self.after:
            _, found, tail = text.rpartition(self.after)
            return tail if found else None
        if self.pattern is None:
            return text
        matches = deque(self.pattern.finditer(text), maxlen=1)
        if not matches:
            return None
        return matches[0].group(1) if self.pattern.groups else matches[0].group()


def compiled(pattern: str) -> re.Pattern[str]:
    """A user's regular expression, with `.` matching newlines.

    Raises:
        UserError: it does not compile.
    """
    try:
        return re.compile(pattern, re.DOTALL)
    except re.error as error:
        raise UserError(f"pattern={pattern!r} is not a regular expression ({error}); see Python's re module") from None


def gold_answers(columns: Mapping[str, Sequence[Any]], count: int, column: str | None) -> list[list[str]]:
    """The accepted answers of every item; an empty list where the data has none.

    A text in GSM8K's style is cut to what follows its last `####`.

    Args:
        columns: values by column name, `count` each.
        count: items.
        column: where they are; dots lead into nested columns. By default, for each item, the first of `GOLD_COLUMNS`
            that is not null.

    Raises:
        UserError: no such column.
    """
    names = GOLD_COLUMNS if column is None else (column,)
    present = [name for name in names if name.split(".")[0] in columns]
    if count and not present:
        given = ", ".join(map(repr, sorted(columns))) or "none"
        hint = nearest(column, columns) if column and columns else f"expected one of {', '.join(GOLD_COLUMNS)}"
        raise UserError(f"no column with the right answers (gold={column!r}; the data has {given}): {hint}")
    return [_first_gold(columns, row, present) for row in range(count)]


def _first_gold(columns: Mapping[str, Sequence[Any]], row: int, names: Sequence[str]) -> list[str]:
    for name in names:
        value = _nested(columns, row, name)
        if value is not None:
            values = value if isinstance(value, list | tuple) else [value]
            return [str(item).rpartition("####")[2].strip() for item in values if item is not None]
    return []


def _nested(columns: Mapping[str, Sequence[Any]], row: int, name: str) -> Any:
    head, *rest = name.split(".")
    value = columns[head][row]
    if rest and isinstance(value, str):
        value = json.loads(value)
    for key in rest:
        value = value.get(key) if isinstance(value, Mapping) else None
    return plain(value)
