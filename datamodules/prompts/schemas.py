"""Detects which columns of a data set hold the prompt, the reference answer and the row's id (see `PromptFile`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from datamodules.answers import AnswerFormat, boxed_answer, extract, gsm8k_answer
from datamodules.errors import UserError, nearest
from datamodules.prompts.tables import Row
from datamodules.types import REWARD_ARGUMENTS, Messages

PROMPTS = ("prompt", "messages", "conversations", "instruction", "input", "question", "problem", "query")
"""Accepted prompt columns, in order of preference."""

_CONVERSATIONS = ("messages", "conversations")
"""Prompt columns whose messages end with a demonstrated reply."""

_CONTEXT = "context"

_AFTER_INSTRUCTION = ("input", _CONTEXT, "question", "problem", "query")
"""Columns that an `instruction` is about, in order of preference: Alpaca's `input`, Dolly's `context`."""

_ROLES = {"human": "user", "gpt": "assistant"}
"""ShareGPT's names of roles."""

ANSWERS = (
    "reward_model.ground_truth",
    "reward_spec.ground_truth",
    "ground_truth",
    "answer",
    "expected_answer",
    "label",
    "solution",
    "output",
    "response",
)
"""Accepted answer columns, in order of preference. A dot leads into a column of objects."""

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
    """

    prompt: str
    answer: str | None = None
    answer_format: AnswerFormat = "verbatim"
    id: str | None = None
    id_is_index: bool = False
    answer_required: bool = True
    parts: tuple[str, ...] = ()
    unused: tuple[str, ...] = ()

    def __str__(self) -> str:
        written = "" if self.answer_format == "verbatim" else f" ({self.answer_format})"
        shown = " + ".join(self.parts or (self.prompt,))
        shown += f" -> {self.answer}{written}" if self.answer else ", no answers"
        return shown + (f"; not shown to the policy: {', '.join(self.unused)}" if self.unused else "")

    @property
    def prompt_sources(self) -> list[str]:
        """Columns from which the prompt is read: paths, and their first parts."""
        return list(dict.fromkeys(name for path in (self.prompt, *self.parts) for name in (path, path.split(".")[0])))

    @property
    def sources(self) -> list[str]:
        """Columns from which prompt, answer and id are read: paths, and their first parts."""
        paths = [path for path in (self.answer, self.id) if path is not None]
        return self.prompt_sources + [name for path in paths for name in (path, path.split(".")[0])]

    def prompt_of(self, row: Row) -> str | Messages | None:
        """Return the text or messages, without demonstrated replies at the end of a conversation; None if blank.

        Raises:
            ValueError: the prompt is neither text nor messages.
        """
        value = lookup(row, self.prompt)
        if isinstance(value, list):
            messages = [_message(item) for item in value]
            while self.prompt in _CONVERSATIONS and messages and messages[-1]["role"] == "assistant":
                messages.pop()
            return messages if question_of(messages).strip() else None
        main = _text(value, self.prompt)
        if main is None or not self.parts:
            return main
        texts = [_text(lookup(row, part), part) for part in self.parts]
        return "\n\n".join(text for text in texts if text is not None)

    def answer_of(self, row: Row) -> object:
        """Return the reference answer, with the type that it has in the data; None if there is none."""
        return extract(lookup(row, self.answer), self.answer_format) if self.answer else None

    def columns_of(self, row: Row, question: str) -> dict[str, object]:
        """Return the columns for the rewards: all but the prompt, with the reference answer under its usual names.

        `answer`, `solution` and `ground_truth` all hold the answer, unless the data has such a column of its own. A
        worked solution in the `answer` column is moved to `rationale`.
        """
        hidden = REWARD_ARGUMENTS | {self.prompt, SUBSET_ID}
        columns = {name: row[name] for name in row if name not in hidden}
        answer = self.answer_of(row)
        additions: dict[str, object] = {"question": question}
        if answer is not None:
            if self.answer == "answer":
                if self.answer_format != "verbatim":
                    additions["rationale"] = row["answer"]
                columns["answer"] = answer
            additions |= dict.fromkeys(("answer", "solution", "ground_truth"), answer)
        for name, value in additions.items():
            if columns.get(name) is None:
                columns[name] = value
        return columns


@dataclass(frozen=True, slots=True)
class SchemaOverrides:
    """Columns named by the user. Paths may be dotted (`extra_info.question`).

    Prompt and id are detected where they are None, the answer where it is "auto"; None says that rows need no answer.
    """

    prompt_column: str | None = None
    answer_column: str | None = "auto"
    answer_format: Literal["auto", "verbatim", "gsm8k", "boxed"] = "auto"
    id_column: str | None = None

    @property
    def named_answer(self) -> str | None:
        """The answer's column if the user named one."""
        return None if self.answer_column == "auto" else self.answer_column


def detect(columns: Sequence[str], probe: Sequence[Row], overrides: SchemaOverrides, source: str) -> Schema:
    """Return the schema of a data set with these columns, whose first rows are `probe`.

    Raises:
        UserError: no column is a prompt, or a named column is missing.
    """
    for path in (overrides.prompt_column, overrides.named_answer, overrides.id_column):
        if path is not None and path not in columns and path.split(".")[0] not in columns:
            raise UserError(f"{source} has no column {path!r}: {nearest(path, columns)}")
    prompt = overrides.prompt_column or next((path for path in PROMPTS if path in columns), None)
    parts: list[str] = []
    if overrides.prompt_column is None and prompt is not None:
        texts = [name for name in columns if all(isinstance(row.get(name), str | None) for row in probe)]
        if prompt == "instruction":
            parts = [prompt, *[name for name in _AFTER_INSTRUCTION if name in texts][:1]]
        elif prompt in _AFTER_INSTRUCTION and _CONTEXT in texts and prompt in texts:
            parts = [_CONTEXT, prompt]
    if prompt is None:
        found, accepted = ", ".join(map(repr, columns)), ", ".join(map(repr, PROMPTS))
        raise UserError(
            f"{source} has no prompt column: its columns are {found}; expected one of {accepted}. Set prompt_column."
        )
    answer = overrides.answer_column
    if answer == "auto":
        answer = _first_present([path for path in ANSWERS if path != prompt], probe)
    index = None if overrides.id_column else _first_present((SUBSET_ID, "extra_info.index"), probe)
    answer_format = overrides.answer_format
    if answer_format == "auto":
        texts = [text for row in probe if answer and isinstance(text := lookup(row, answer), str)]
        if texts and all(gsm8k_answer(text) is not None for text in texts):
            answer_format = "gsm8k"
        elif answer == "solution" or (texts and all(boxed_answer(text) is not None for text in texts)):
            answer_format = "boxed"
        else:
            answer_format = "verbatim"
    return Schema(
        prompt=prompt,
        answer=answer,
        answer_format=answer_format,
        id=overrides.id_column or index or ("id" if "id" in columns else None),
        id_is_index=bool(overrides.id_column or index),
        answer_required=SUBSET_ID not in columns,
        parts=tuple(parts) if len(parts) > 1 else (),
        unused=()
        if overrides.prompt_column or SUBSET_ID in columns
        else tuple(name for name in (*PROMPTS, _CONTEXT) if name in columns and name not in (prompt, answer, *parts)),
    )


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


def question_of(prompt: str | Messages) -> str:
    """Return the raw question: the text itself, or the user's last message."""
    if isinstance(prompt, str):
        return prompt
    questions = [message["content"] for message in prompt if message["role"] == "user"]
    return questions[-1] if questions else ""


def _first_present(paths: Sequence[str], probe: Sequence[Row]) -> str | None:
    return next((path for path in paths if any(lookup(row, path) is not None for row in probe)), None)


def _text(value: object, column: str) -> str | None:
    """Return a value's text, or None if it is blank. Raises ValueError if it is neither text nor a number."""
    if value is None or isinstance(value, str):
        return value if value and value.strip() else None
    if isinstance(value, int | float):
        return str(value)
    raise ValueError(f"column {column!r} holds {_kind(value)}, not text or messages. Correct the data.")


def _message(item: object) -> dict[str, str]:
    if isinstance(item, Mapping) and {"from", "value"} <= item.keys():
        item = {"role": _ROLES.get(item["from"], item["from"]), "content": item["value"]}
    if not isinstance(item, Mapping) or "role" not in item or "content" not in item:
        raise ValueError(f"a list holds {_kind(item)}, not messages with 'role' and 'content'. Correct the data.")
    content = item["content"] or ""
    if isinstance(content, list):
        parts = [part.get("text") if isinstance(part, Mapping) else part for part in content]
        texts = [part for part in parts if isinstance(part, str)]
        if len(texts) < len(parts):
            raise ValueError("a message holds parts other than text, which is all that is supported. Remove the row.")
        content = "".join(texts)
    return {"role": str(item["role"]), "content": str(content)}


def _kind(value: object) -> str:
    return f"an object with keys {sorted(value)}" if isinstance(value, Mapping) else f"a {type(value).__name__}"
