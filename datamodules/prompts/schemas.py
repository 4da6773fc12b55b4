"""How the prompt, the reference answer and what else a row holds are read from its columns."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from datamodules.answers import AnswerFormat, extract
from datamodules.prompts.choices import Choices, Naming, choices_of, is_blank
from datamodules.prompts.messages import (
    CALLS,
    as_message,
    content_of,
    is_conversation,
    is_message,
    kind_of,
    question_of,
    role_of,
    without_none,
)
from datamodules.prompts.tables import Row
from datamodules.types import REWARD_ARGUMENTS, Messages

CONVERSATIONS = ("messages", "conversations", "conversation")
"""Prompt columns whose messages end with a demonstrated reply."""

PREFERENCES = {"chosen", "rejected"}
"""Columns of data for DPO."""

SUBSET_ID = "dots_id"
"""Column that holds the prompt ids in files written by `write_subset`. Every row has one."""


@dataclass(frozen=True, slots=True)
class Schema:
    """How to read a row.

    Attributes:
        prompt: path of the prompt, a text or messages.
        answer: path of the reference answer; None if the data has none.
        answer_format: how the answer is written.
        id: path of the row's stable id; None if the data has none.
        id_is_index: whether `id` may repeat (verl counts within each data source), rather than name rows uniquely.
        answer_required: whether a row without an answer is dropped.
        parts: columns whose texts make the prompt, in order, separated by empty lines, where it has several. Only
            `prompt` must be there in every row.
        unused: columns that hold a prompt in other schemas.
        choices: column with the choices of a multiple-choice question, or one column for each choice. They follow the
            prompt, unless `hides_choices`.
        naming: how the answers of multiple-choice questions name a choice; None if they have none.
        hides_choices: whether the choices are left out of the prompt, because a template names them.
        keeps_prompt: whether `prompt` is also a column for the rewards, because a template names it.
        ends_with_answer: whether the answer is the last turn of the assistant in `prompt`.
        system: column with each row's system message; None if there is none.
        tools: column with the functions that the chat template describes; None if there is none.
        others: all other columns, where no column holds answers and none was named.
        may_be_blank: whether a conversation whose user says nothing is a prompt, because an environment adds to it.
    """

    prompt: str
    answer: str | None = None
    answer_format: AnswerFormat = "verbatim"
    id: str | None = None
    id_is_index: bool = False
    answer_required: bool = True
    parts: tuple[str, ...] = ()
    unused: tuple[str, ...] = ()
    choices: tuple[str, ...] = ()
    naming: Naming | None = None
    hides_choices: bool = False
    keeps_prompt: bool = False
    ends_with_answer: bool = False
    system: str | None = None
    tools: str | None = None
    others: tuple[str, ...] = ()
    may_be_blank: bool = False

    def __str__(self) -> str:
        written = "" if self.answer_format == "verbatim" else f" ({self.answer_format})"
        choices = self.choices if len(self.choices) < 2 else (f"{self.choices[0]} to {self.choices[-1]}",)
        shown = " + ".join((*(self.parts or (self.prompt,)), *choices))
        if self.ends_with_answer:
            shown += f" -> its last turn{written}"
        elif self.choices:
            counted = {"index": ", which counts from 0", "number": ", which counts from 1"}.get(self.naming or "", "")
            shown = f"read as multiple choice: {shown}" + (f" -> letter of {self.answer}{counted}" * bool(self.answer))
        else:
            shown += f" -> {self.answer}{written}" if self.answer else ", no answers"
        shown += f"; system message: {self.system}" if self.system else ""
        shown += f"; tools: {self.tools}" if self.tools else ""
        shown += f"; not shown to the policy: {', '.join(self.unused)}" if self.unused else ""
        return shown

    @property
    def prompt_sources(self) -> list[str]:
        """Columns from which the prompt is read: paths, and their first parts."""
        return with_heads((self.prompt, *self.parts, *self.choices))

    @property
    def sources(self) -> list[str]:
        """Columns from which prompt, answer, id, system message and tools are read: paths, and their first parts."""
        paths = (self.answer, self.id, self.system, self.tools)
        return self.prompt_sources + with_heads([path for path in paths if path is not None])

    def without(self, fields: Sequence[str]) -> Schema:
        """Return the schema whose prompt leaves out what a template names by itself: other parts, and the choices."""
        parts = tuple(part for part in self.parts if part == self.prompt or part not in fields)
        hides = self.hides_choices or any(column in fields for column in self.choices)
        parts = parts if len(parts) > 1 else ()
        return replace(self, parts=parts, hides_choices=hides, keeps_prompt=self.prompt in fields)

    def prompt_of(self, row: Row) -> str | Messages | None:
        """Return the text or messages, without demonstrated replies at the end of a conversation; None if blank.

        Raises:
            ValueError: the prompt is neither text nor messages.
        """
        value = lookup(row, self.prompt)
        if isinstance(value, list):
            messages = [as_message(item) for item in value]
            ends = self.ends_with_answer or self.prompt.lower() in (*CONVERSATIONS, *PREFERENCES)
            while ends and messages and messages[-1]["role"] == "assistant":
                messages.pop()
            return messages if self.may_be_blank or question_of(messages).strip() else None
        main = _text(value, self.prompt)
        if main is not None and self.parts:
            texts = [_text(lookup(row, part), part) for part in self.parts]
            main = "\n\n".join(text for text in texts if text is not None)
        if main is None or not self.choices or self.hides_choices:
            return main
        return f"{main}\n{choices_in(row, self.choices) or ''}".rstrip("\n")

    def has_calls(self, row: Row) -> bool:
        """Return whether a turn of the row's conversation calls functions."""
        value = lookup(row, self.prompt)
        return isinstance(value, list) and any(is_message(one) and bool(one.get(CALLS)) for one in value)

    def answer_of(self, row: Row) -> object:
        """Return the reference answer, with the type that it has in the data; None if there is none.

        Raises:
            ValueError: it names none of the row's choices.
        """
        value = self.written_answer(row)
        if self.naming is None:
            return extract(value, self.answer_format)
        choices = choices_in(row, self.choices)
        if is_blank(value) or choices is None:
            return None
        if letter := choices.letter_of(value, self.naming):
            return letter
        raise ValueError(f"{self.answer} is {value!r}, which names none of {len(choices.texts)} choices. Correct it.")

    def written_answer(self, row: Row) -> object:
        """Return the value of the answer's column; where it is a conversation, its last turn if it is a reply."""
        value = lookup(row, self.answer) if self.answer else None
        if isinstance(value, list) and is_conversation(value):
            return content_of(value[-1]) if role_of(value[-1]) == "assistant" else None
        return None if self.ends_with_answer else value

    def system_of(self, row: Row) -> str | None:
        """Return the row's own system message; None if it has none. Raises ValueError if it is no text."""
        return None if self.system is None else _text(row.get(self.system), self.system)

    def tools_of(self, row: Row) -> list[dict[str, Any]] | None:
        """Return the functions for the chat template; None if the row has none. Raises ValueError if it is no list."""
        value = None if self.tools is None else row.get(self.tools)
        if isinstance(value, str) and value.strip():
            try:
                value = json.loads(value)
            except ValueError as error:
                raise ValueError(f"column {self.tools!r} is not JSON ({error}). Correct the data.") from error
        if not value:
            return None
        if not isinstance(value, list) or not all(isinstance(one, Mapping) for one in value):
            raise ValueError(
                f"column {self.tools!r} holds {kind_of(value)}, not a list of functions. Correct the data."
            )
        return [without_none(one) for one in value]

    def columns_of(self, row: Row, question: str) -> dict[str, object]:
        """Return the columns for the rewards: all but the prompt, with the reference answer under its usual names.

        Where a template names the prompt's column, it is one of them: what the rewards get as prompt is the whole text.

        `answer`, `solution` and `ground_truth` all hold the answer, unless the data has such a column of its own. A
        worked solution in the `answer` column is moved to `rationale`.
        """
        hidden = {*REWARD_ARGUMENTS, SUBSET_ID, *(() if self.keeps_prompt else (self.prompt,))}
        columns = {name: row[name] for name in row if name not in hidden}
        answer = self.answer_of(row)
        additions: dict[str, object] = {"question": question}
        if answer is not None:
            if self.answer == "answer" and self.answer_format != "verbatim":
                additions["rationale"] = row["answer"]
            if self.answer == "answer" or self.naming:  # where letters are asked for, no other column is the answer
                columns["answer"] = answer
            additions |= dict.fromkeys(("answer", "solution", "ground_truth"), answer)
        for name, value in additions.items():
            if columns.get(name) is None:
                columns[name] = value
        return columns


def choices_in(row: Row, paths: Sequence[str]) -> Choices | None:
    """Return a row's choices, which are in one column or in a column each; None if it has none."""
    if len(paths) == 1:
        return choices_of(lookup(row, paths[0]))
    return choices_of([value for value in (row.get(path) for path in paths) if value is not None])


def lookup(row: Row, path: str) -> object:
    """Return the value at a path: the column of exactly that name, else a key within a column of objects, or None."""
    if path in row:
        return row[path]
    value: object = row
    for key in path.split("."):
        if not isinstance(value, Mapping) or key not in value:
            return None
        value = value[key]
    return value


def with_heads(paths: Sequence[str]) -> list[str]:
    """Return paths and the columns that they lead into."""
    return list(dict.fromkeys(name for path in paths for name in (path, path.split(".")[0])))


def _text(value: object, column: str) -> str | None:
    """Return a value's text, or None if it is blank. Raises ValueError if it is neither text nor a number."""
    if value is None or isinstance(value, str):
        return value if value and value.strip() else None
    if isinstance(value, int | float):
        return str(value)
    raise ValueError(f"column {column!r} holds {kind_of(value)}, not text or messages. Correct the data.")
