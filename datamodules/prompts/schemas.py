"""Which column of a data set is the prompt, which one holds the reference answer, and what its rows are called.

Known without being told (columns -> prompt, answer):
    TRL `prompt, solution`; verl `prompt, reward_model.ground_truth`; SkyRL `prompt, reward_spec.ground_truth`;
    open-instruct `messages, ground_truth`; OpenRLHF `input, label`; NeMo-RL `input, output`;
    GSM8K `question, answer` with `####`; MATH `problem, answer` or `problem, solution` with a boxed answer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from datamodules.errors import UserError, nearest
from datamodules.prompts.answers import AnswerFormat, extract, gsm8k_answer, last_boxed
from datamodules.types import Messages

PROMPTS = ("prompt", "messages", "input", "question", "problem")
"""Accepted prompt columns; the first that is there is taken."""

ANSWERS = (
    "reward_model.ground_truth",
    "reward_spec.ground_truth",
    "ground_truth",
    "answer",
    "label",
    "solution",
    "output",
)
"""Accepted answer columns; the first that is there is taken. A dot goes into a column of objects."""

REWARD_ARGUMENTS = frozenset({"prompts", "completions", "completion_ids", "trainer_state", "log_extra", "log_metric"})
"""What a reward function is called with beside the columns: a column of that name cannot be handed to it."""

SUBSET_ID = "dots_id"
"""The column in which a file that we wrote keeps the ids of its prompts. None of its rows is empty."""

Row = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Schema:
    """How a row is read.

    Attributes:
        prompt: path of the prompt: a text or messages.
        answer: path of the reference answer; None when the data has none.
        answer_format: how the answer is written there.
        id: path of the row's stable name; None when the data has none.
        id_is_index: whether `id` may repeat (verl's index counts within each data source), not only name rows.
        answer_required: whether a row without an answer is useless.
    """

    prompt: str
    answer: str | None = None
    answer_format: AnswerFormat = "verbatim"
    id: str | None = None
    id_is_index: bool = False
    answer_required: bool = True

    def __str__(self) -> str:
        written = "" if self.answer_format == "verbatim" else f" ({self.answer_format})"
        return f"{self.prompt} -> {self.answer}{written}" if self.answer else f"{self.prompt}, no answers"

    @property
    def sources(self) -> list[str]:
        """The top-level columns that prompt, answer and id are read from (paths without their tail)."""
        paths = [path for path in (self.prompt, self.answer, self.id) if path is not None]
        return list(dict.fromkeys(name for path in paths for name in (path, path.split(".")[0])))

    def prompt_of(self, row: Row) -> str | Messages | None:
        """The text or the messages, without the demonstrated reply that `messages` may end with; None when blank.

        Raises ValueError, saying what is expected, for anything else.
        """
        value = lookup(row, self.prompt)
        if isinstance(value, list):
            messages = [_message(item) for item in value]
            while self.prompt == "messages" and messages and messages[-1]["role"] == "assistant":
                messages.pop()
            return messages if question_of(messages).strip() else None
        if value is None or isinstance(value, str):
            return value if value and value.strip() else None
        if isinstance(value, int | float):
            return str(value)
        raise ValueError(f"column {self.prompt!r} holds {_kind(value)}: expected text or messages")

    def answer_of(self, row: Row) -> str | list[str] | None:
        return extract(lookup(row, self.answer), self.answer_format) if self.answer else None

    def columns_of(self, row: Row, question: str) -> dict[str, Any]:
        """What the rewards get: every column but the prompt, with the reference answer under its usual names.

        `answer`, `solution` and `ground_truth` all hold it, except where the data has such a column of its own. A
        worked solution that stood in the `answer` column is moved to `rationale`.
        """
        hidden = REWARD_ARGUMENTS | {self.prompt, SUBSET_ID}
        columns = {name: row[name] for name in row if name not in hidden}
        _fill(columns, "question", question)
        answer = self.answer_of(row)
        if answer is None:
            return columns
        if self.answer == "answer":
            if self.answer_format != "verbatim":
                _fill(columns, "rationale", row["answer"])
            columns["answer"] = answer
        for name in ("answer", "solution", "ground_truth"):
            _fill(columns, name, answer)
        return columns


@dataclass(frozen=True, slots=True)
class SchemaOverrides:
    """What the user says about the columns; None means: look. Paths may be dotted (`extra_info.question`)."""

    prompt_column: str | None = None
    answer_column: str | None = None
    answer_format: Literal["auto", "verbatim", "gsm8k", "boxed"] = "auto"
    id_column: str | None = None


def detect(columns: Sequence[str], probe: Sequence[Row], overrides: SchemaOverrides, source: str) -> Schema:
    """The schema of a data set with these columns, whose first rows are `probe`.

    Raises UserError, naming the columns found and those accepted, when there is no prompt among them.
    """
    for path in (overrides.prompt_column, overrides.answer_column, overrides.id_column):
        if path is not None and path not in columns and path.split(".")[0] not in columns:
            raise UserError(f"{source} has no column {path!r}: {nearest(path, columns)}")
    prompt = overrides.prompt_column or next((path for path in PROMPTS if path in columns), None)
    if prompt is None:
        found, accepted = ", ".join(map(repr, columns)), ", ".join(map(repr, PROMPTS))
        raise UserError(f"{source} has no prompt column: found {found}; accepted {accepted}, or name it: prompt_column")
    answer = overrides.answer_column or _first_present(ANSWERS, probe, besides=prompt)
    index = None if overrides.id_column else _first_present((SUBSET_ID, "extra_info.index"), probe)
    return Schema(
        prompt=prompt,
        answer=answer,
        answer_format=_format(answer, probe, overrides),
        id=overrides.id_column or index or ("id" if "id" in columns else None),
        id_is_index=bool(overrides.id_column or index),
        answer_required=SUBSET_ID not in columns,
    )


def lookup(row: Row, path: str) -> Any:
    """Value at a path: the column of that very name, else a key inside a column of objects; None when absent."""
    if path in row:
        return row[path]
    value: Any = row
    for key in path.split("."):
        if not isinstance(value, Mapping) or key not in value:
            return None
        value = value[key]
    return value


def question_of(prompt: str | Messages) -> str:
    """The raw question: the text itself, or what the user said last."""
    if isinstance(prompt, str):
        return prompt
    said = [message["content"] for message in prompt if message["role"] == "user"]
    return said[-1] if said else ""


def _first_present(paths: Sequence[str], probe: Sequence[Row], besides: str | None = None) -> str | None:
    return next(
        (path for path in paths if path != besides and any(lookup(row, path) is not None for row in probe)), None
    )


def _format(answer: str | None, probe: Sequence[Row], overrides: SchemaOverrides) -> AnswerFormat:
    if overrides.answer_format != "auto":
        return overrides.answer_format
    texts = [text for row in probe if answer and isinstance(text := lookup(row, answer), str)]
    if texts and all(gsm8k_answer(text) is not None for text in texts):
        return "gsm8k"
    if answer == "solution" or (texts and all(last_boxed(text) is not None for text in texts)):
        return "boxed"
    return "verbatim"


def _message(item: Any) -> dict[str, str]:
    if not isinstance(item, Mapping) or "role" not in item or "content" not in item:
        raise ValueError(f"a list holds {_kind(item)}: expected messages with 'role' and 'content'")
    content = item["content"] or ""
    if isinstance(content, list):
        parts = [part.get("text") if isinstance(part, Mapping) else part for part in content]
        texts = [part for part in parts if isinstance(part, str)]
        if len(texts) < len(parts):
            raise ValueError("a message holds something else than text: only text is supported")
        content = "".join(texts)
    return {"role": str(item["role"]), "content": str(content)}


def _fill(columns: dict[str, Any], name: str, value: Any) -> None:
    if columns.get(name) is None:
        columns[name] = value


def _kind(value: Any) -> str:
    return f"an object with keys {sorted(value)}" if isinstance(value, Mapping) else f"a {type(value).__name__}"
