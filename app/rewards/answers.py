"""The model's answer, the reference answers, and the base class of rewards that compare the two."""

from __future__ import annotations

import json
import logging
import re
import time
from abc import abstractmethod
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress

import numpy as np

from app.rewards.base import EXTRACTED_ANSWER, Column, Reward, Scores, Texts, TokenIds
from datamodules.answers import accepted
from datamodules.errors import UserError, nearest
from datamodules.types import REWARD_ARGUMENTS, Messages

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
"""Columns that may hold the reference answer, in order of preference."""


CHECK_SECONDS = 5.0
"""Time for reading the reference answers of a pool before the first rollout."""
logger = logging.getLogger("dots.rewards")


def text_of(completion: str | Messages) -> str:
    """Return the text of a plain completion, or of the last turn of the policy in a conversational one; "" without."""
    if isinstance(completion, str):
        return completion
    spoken = [message for message in completion if message["role"] == "assistant"]
    return str(spoken[-1].get("content") or "") if spoken else ""


def whole_text(messages: str | Messages) -> str:
    """Return a text, or a conversation as one: the content of a single message, else paragraphs `Role: content`."""
    if isinstance(messages, str):
        return messages
    parts = []
    for message in messages:
        content = message.get("content") or ""
        calls = message.get("tool_calls")
        said = [content if isinstance(content, str) else _json(content), *([_json(calls)] if calls else [])]
        parts.append("\n".join(filter(None, said)))
    if len(messages) == 1:
        return parts[0]
    roles = [str(message["role"]).capitalize() for message in messages]
    return "\n\n".join(f"{role}: {part}" for role, part in zip(roles, parts, strict=True))


def _json(value: object) -> str:
    return json.dumps(plain(value), ensure_ascii=False, default=str)


def plain(value: object) -> object:
    """Convert NumPy arrays, NumPy scalars and mappings to lists, numbers and dicts, at any depth."""
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
    """Locates the answer within a completion.

    Both options are empty when unset.

    Args:
        after: the answer is the text after the last occurrence of this string.
        pattern: alternatively, the answer is the last match of this regular expression, or its first group.

    Raises:
        UserError: both are given, or `pattern` is not a regular expression.
    """

    def __init__(self, after: str, pattern: str) -> None:
        if after and pattern:
            raise UserError(f"after={after!r} and pattern={pattern!r} are both set, but only one can be. Remove one.")
        self.after = after
        self.pattern = compiled(pattern) if pattern else None

    def __call__(self, text: str) -> str | None:
        """Return the answer within `text` (all of `text` if neither option is set), or None if there is none."""
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
    """Compile a user's regular expression, with `.` matching newlines. Raises UserError if it is not valid."""
    try:
        return re.compile(pattern, re.DOTALL)
    except re.error as error:
        raise UserError(
            f"pattern={pattern!r} is not a valid regular expression ({error}). See the documentation of Python's re."
        ) from None


class AnswerReward(Reward):
    """Base of rewards that compare each completion with the reference answers of its row, from the column `gold`."""

    one_by_one = True

    def __init__(self, weight: float, correctness: bool | None, name: str | None, gold: str | None) -> None:
        super().__init__(weight, correctness, name)
        self.gold = gold

    def __call__(self, /, prompts: Texts, completions: Texts, completion_ids: TokenIds, **columns: Column) -> Scores:
        answers = gold_answers(columns, len(completions), self.gold)
        if callable(log_extra := columns.get("log_extra")):
            log_extra(EXTRACTED_ANSWER, [self.extract(text_of(text)) for text in completions])
        return [self.score(text_of(text), gold) for text, gold in zip(completions, answers, strict=True)]

    def extract(self, text: str) -> str | None:
        """Return the answer that a completion gives, as text that is equal for equal answers; None without one."""
        return None

    def can_read(self, gold: str) -> bool:
        """Return whether a reference answer says something that this reward can compare with."""
        return bool(gold)

    @abstractmethod
    def score(self, text: str, gold: list[str]) -> float | None:
        """Score one completion against its accepted answers, of which there may be none."""


def gold_columns(rewards: Sequence[Reward]) -> list[str]:
    """Return the columns from which rewards may read reference answers."""
    golds = [reward.gold for reward in rewards if isinstance(reward, AnswerReward)]
    return [name for gold in golds for name in ([gold] if gold else GOLD_COLUMNS)]


def check_answers(
    rewards: Sequence[Reward], ids: Sequence[str], rows: Iterable[Mapping[str, object]], source: str
) -> None:
    """Say in one line how many reference answers no reward can read, and name the first; stop after `CHECK_SECONDS`.

    Args:
        rewards: all rewards of a run.
        ids: `Q` prompt ids.
        rows: for each prompt its columns, at least those that hold reference answers.
        source: name of the prompts, for messages.

    Raises:
        UserError: there are such answers and no others, and no reward but these is about correctness.
    """
    readers = [reward for reward in rewards if isinstance(reward, AnswerReward)]
    if not readers:
        return
    deadline, read, unread, first = time.monotonic() + CHECK_SECONDS, 0, 0, ""
    for name, row in zip(ids, rows, strict=True):
        columns = {column: [value] for column, value in row.items()}
        try:
            golds = [(reward, gold) for reward in readers for gold in gold_answers(columns, 1, reward.gold)[0]]
        except UserError:
            return  # the trial of the rewards, which has all columns, says more
        if golds and not any(reward.can_read(gold) for reward, gold in golds):
            unread += 1
            first = first or f"{golds[0][1][:80]!r} of prompt {name!r}"
        read += bool(golds)
        if time.monotonic() > deadline:
            break
    if unread:
        names = ", ".join(reward.name for reward in readers)
        found = f"{unread} of {read} reference answers of {source} cannot be read by {names}, the first is {first}."
        if unread == read and all(reward in readers or reward.correctness is False for reward in rewards):
            raise UserError(f"{found} Choose another reward, set its option gold, or correct the data.")
        logger.warning("%s These rewards do not apply to such prompts.", found)


def gold_answers(columns: Mapping[str, Column], count: int, column: str | None) -> list[list[str]]:
    """Return the accepted answers of each of `count` rows (see `datamodules.answers`); an empty list without any.

    Args:
        columns: values by column name, `count` each.
        count: number of rows.
        column: column with the answers; a dot leads into a nested column. By default, for each row, the first of
            `GOLD_COLUMNS` that holds an answer.

    Raises:
        UserError: there is no such column.
    """
    names = GOLD_COLUMNS if column is None else (column,)
    present = [name for name in names if name.split(".")[0] in columns]
    if count and not present:
        own = sorted(columns.keys() - REWARD_ARGUMENTS)
        others = ", ".join(repr(name) for name in own if name != "question") or "none"
        if column is not None and own:
            require_column(column, columns, "gold")
        raise UserError(
            f"The data has no column with reference answers (columns that are not the prompt: {others}). Set "
            "answer_column of its source to the right one, e.g. --data.train.answer_column NAME, or give it one of the "
            f"usual names: {', '.join(GOLD_COLUMNS)}."
        )
    return [_first_gold(columns, row, present) for row in range(count)]


def _first_gold(columns: Mapping[str, Column], row: int, names: Sequence[str]) -> list[str]:
    return next(filter(None, (accepted(value_at(columns, name, row)) for name in names)), [])


def value_at(columns: Mapping[str, Column], name: str, row: int) -> object:
    """Return a row's value of an existing column; a dot reads a nested key, None where it is missing."""
    head, *rest = name.split(".")
    value: object = columns[head][row]
    if rest and isinstance(value, str):
        with suppress(ValueError):  # text that is no JSON has no such key
            value = json.loads(value)
    for key in rest:
        value = value.get(key) if isinstance(value, Mapping) else None
    return value


def require_column(name: str, columns: Mapping[str, Column], wanted_by: str) -> None:
    """Raise UserError if the data have no column of this name, or none that it leads into."""
    own = sorted(columns.keys() - REWARD_ARGUMENTS)
    if name.split(".")[0] not in own:
        given = ", ".join(map(repr, own)) or "none"
        hint = f": {nearest(name, own)}" if own else "."
        raise UserError(f"The data has no column {name!r} for {wanted_by}, only {given}{hint}")
