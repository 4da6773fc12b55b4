"""Detects which columns of a data set hold the prompt, the reference answer and the row's id (see `PromptFile`)."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from datamodules.answers import AnswerFormat, boxed_answer, extract, gsm8k_answer
from datamodules.errors import UserError, nearest
from datamodules.prompts.choices import CHOICE_ANSWERS, CHOICES, Choices, Naming, choices_of, is_blank, naming_of
from datamodules.prompts.tables import Row
from datamodules.types import REWARD_ARGUMENTS, Messages

PROMPTS = (
    "prompt",
    "messages",
    "conversations",
    "instruction",
    "input",
    "question",
    "problem",
    "query",
    "conversation",
    "question_stem",
)
"""Accepted prompt columns, in order of preference, whatever their case."""

_CONVERSATIONS = ("messages", "conversations", "conversation")
"""Prompt columns whose messages end with a demonstrated reply."""

_SYSTEM = ("system", "system_prompt")
"""Columns that hold each row's own system message."""

_TOOLS = "tools"
"""Column with the functions that a row's chat template describes."""

_LETTERS = ("A", "B", "C", "D", "E", "F", "G", "H", "I", "J")
"""Columns of a table of multiple-choice questions, a column per choice."""

_NESTED = ("question.choices",)
"""Choices of the files in which `question` is an object."""

_PREFERENCES = {"chosen", "rejected"}
"""Columns of data for DPO."""

_CONTEXT = "context"

_AFTER_INSTRUCTION = ("input", _CONTEXT, "question", "problem", "query")
"""Columns that an `instruction` is about, in order of preference: Alpaca's `input`, Dolly's `context`."""

_ROLES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant", "model": "assistant"}
"""ShareGPT's names of roles, and those of its kin."""

PROBE = 64
"""Number of rows that the schema is detected from."""

_SHAREGPT, _TURN = {"from", "value"}, {"role", "content"}
"""Keys of a message."""

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
    "completion",
)
"""Accepted answer columns, in order of preference, whatever their case. A dot leads into a column of objects."""

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
        ends_with_answer: whether the answer is the last turn of the assistant in `prompt`.
        system: column with each row's system message; None if there is none.
        tools: column with the functions that the chat template describes; None if there is none.
        others: all other columns, where no column holds answers and none was named.
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
    ends_with_answer: bool = False
    system: str | None = None
    tools: str | None = None
    others: tuple[str, ...] = ()

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
        return replace(self, parts=parts if len(parts) > 1 else (), hides_choices=hides)

    def prompt_of(self, row: Row) -> str | Messages | None:
        """Return the text or messages, without demonstrated replies at the end of a conversation; None if blank.

        Raises:
            ValueError: the prompt is neither text nor messages.
        """
        value = lookup(row, self.prompt)
        if isinstance(value, list):
            messages = [_message(item) for item in value]
            ends = self.ends_with_answer or self.prompt.lower() in (*_CONVERSATIONS, *_PREFERENCES)
            while ends and messages and messages[-1]["role"] == "assistant":
                messages.pop()
            return messages if question_of(messages).strip() else None
        main = _text(value, self.prompt)
        if main is not None and self.parts:
            texts = [_text(lookup(row, part), part) for part in self.parts]
            main = "\n\n".join(text for text in texts if text is not None)
        if main is None or not self.choices or self.hides_choices:
            return main
        return f"{main}\n{_choices(row, self.choices) or ''}".rstrip("\n")

    def answer_of(self, row: Row) -> object:
        """Return the reference answer, with the type that it has in the data; None if there is none.

        Raises:
            ValueError: it names none of the row's choices.
        """
        value = self.written_answer(row)
        if self.naming is None:
            return extract(value, self.answer_format)
        choices = _choices(row, self.choices)
        if is_blank(value) or choices is None:
            return None
        if letter := choices.letter_of(value, self.naming):
            return letter
        raise ValueError(f"{self.answer} is {value!r}, which names none of {len(choices.texts)} choices. Correct it.")

    def written_answer(self, row: Row) -> object:
        """Return the value of the answer's column; where it is a conversation, its last turn if it is a reply."""
        value = lookup(row, self.answer) if self.answer else None
        if isinstance(value, list) and _is_conversation(value):
            return _content(value[-1]) if _role(value[-1]) == "assistant" else None
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
            raise ValueError(f"column {self.tools!r} holds {_kind(value)}, not a list of functions. Correct the data.")
        return [_without_none(one) for one in value]

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
            if self.answer == "answer" and self.answer_format != "verbatim":
                additions["rationale"] = row["answer"]
            if self.answer == "answer" or self.naming:  # where letters are asked for, no other column is the answer
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
    folded = {name.lower(): name for name in reversed(columns)}
    # Other cases count only where no name is spelt as it is known.
    names = {name: name for name in columns} if any(path in columns for path in PROMPTS) else folded
    prompt = overrides.prompt_column or next((names[path] for path in PROMPTS if path in names), None)
    answer = overrides.answer_column
    if answer == "auto":
        answer = _first_present([path for path in ANSWERS if path != prompt], probe) or _first_present(
            [folded[path] for path in ANSWERS if path in folded and folded[path] != prompt], probe
        )
        if answer is None and folded.keys() >= _PREFERENCES:
            raise _preferences(source, prompt, probe, folded["chosen"])
    choices, naming = tuple[str, ...](), None
    if not overrides.prompt_column and SUBSET_ID not in columns:
        choices, named, naming = _multiple_choice(columns, probe, overrides)
        if choices == _NESTED:
            prompt = "question.stem"
        if choices and prompt and any(isinstance(lookup(row, prompt), list) for row in probe):
            choices, naming = (), None
        elif choices:
            answer = named
    parts: list[str] = []
    if overrides.prompt_column is None and prompt is not None:
        texts = {key for key, name in names.items() if all(isinstance(row.get(name), str | None) for row in probe)}
        key = next((key for key, name in names.items() if name == prompt), prompt)
        if key == "instruction":
            parts = [prompt, *[names[name] for name in _AFTER_INSTRUCTION if name in texts][:1]]
        elif key in _AFTER_INSTRUCTION and _CONTEXT in texts and key in texts:
            parts = [names[_CONTEXT], prompt]
    if prompt is None:
        found, accepted = ", ".join(map(repr, columns)), ", ".join(map(repr, PROMPTS))
        hint = f"={folded['text']} if it holds prompts: text for pretraining has none" if "text" in folded else ""
        raise UserError(
            f"{source} has no prompt column: its columns are {found}; expected one of {accepted}. "
            f"Set prompt_column{hint}."
        )
    ends_with_answer = (
        overrides.answer_column == "auto" and answer is None and _ends_with_answer(prompt, probe, overrides)
    )
    index = None if overrides.id_column else _first_present((SUBSET_ID, "extra_info.index"), probe)
    schema = Schema(
        prompt=prompt,
        answer=prompt if ends_with_answer else answer,
        answer_format="verbatim" if overrides.answer_format == "auto" else overrides.answer_format,
        id=overrides.id_column or index or ("id" if "id" in columns else None),
        id_is_index=bool(overrides.id_column or index),
        answer_required=SUBSET_ID not in columns and not ends_with_answer,
        parts=tuple(parts) if len(parts) > 1 else (),
        choices=choices,
        naming=naming,
        ends_with_answer=ends_with_answer,
        system=_first_text_column([name for name in _SYSTEM if name in columns and name != prompt], probe),
        tools=_TOOLS if _TOOLS in columns and _first_present([_TOOLS], probe) else None,
    )
    if overrides.answer_format == "auto" and naming is None:
        written = [text for row in probe if isinstance(text := schema.written_answer(row), str)]
        if written and all(gsm8k_answer(text) is not None for text in written):
            schema = replace(schema, answer_format="gsm8k")
        elif answer == "solution" or (written and all(boxed_answer(text) is not None for text in written)):
            schema = replace(schema, answer_format="boxed")
    used = {prompt.split(".")[0], schema.answer, *parts, *choices, schema.system, schema.tools}
    candidates = [name for name in (*PROMPTS, _CONTEXT, *CHOICES) if name in columns]
    candidates = [] if overrides.prompt_column or SUBSET_ID in columns else candidates
    others = columns if overrides.answer_column == "auto" and schema.answer is None and not choices else []
    return replace(
        schema,
        unused=tuple(name for name in candidates if name not in used),
        others=tuple(name for name in others if name not in {*used, *candidates, schema.id, *REWARD_ARGUMENTS}),
    )


def _multiple_choice(
    columns: Sequence[str], probe: Sequence[Row], overrides: SchemaOverrides
) -> tuple[tuple[str, ...], str | None, Naming | None]:
    """Return the columns of the choices, the one of the answer and how it names a choice.

    They are empty and None where the first rows have no choices, or an answer that names none of them.
    """
    lettered = tuple(name for name in _LETTERS if name in columns)
    paths: list[tuple[str, ...]] = [(path,) for path in CHOICES if path.split(".")[0] in columns]
    paths += [lettered] if len(lettered) > 1 and lettered == _LETTERS[: len(lettered)] else []
    answers = [*CHOICE_ANSWERS, *ANSWERS] if overrides.answer_column == "auto" else [overrides.named_answer or ""]
    folded = {name.lower(): name for name in columns}
    for path in paths:
        choices = [_choices(row, path) for row in probe]
        readable = [(one, row) for one, row in zip(choices, probe, strict=True) if one is not None]
        if not readable or len(readable) < len(choices):
            continue
        if overrides.answer_column is None:
            return path, None, None
        for answer in dict.fromkeys(folded.get(name.lower(), name) for name in answers):
            if naming := naming_of([(one, lookup(row, answer)) for one, row in readable]):
                return path, answer, naming
    return (), None, None


def _choices(row: Row, paths: Sequence[str]) -> Choices | None:
    if len(paths) == 1:
        return choices_of(lookup(row, paths[0]))
    return choices_of([value for value in (row.get(path) for path in paths) if value is not None])


def _ends_with_answer(prompt: str, probe: Sequence[Row], overrides: SchemaOverrides) -> bool:
    """Return whether the last turns of conversations are answers.

    Those of a `prompt` may also be the start of a reply, which the policy continues. Such a start is the same in all
    rows, and a column that the user names is the whole prompt.
    """
    turns = [value[-1] for row in probe if isinstance(value := lookup(row, prompt), list) and _is_conversation(value)]
    replies = {str(_content(one)) for one in turns if _role(one) == "assistant" and _content(one)}
    if prompt.lower() in _CONVERSATIONS:
        return bool(replies)
    ended = all(_role(one) == "assistant" for one in turns)
    return not overrides.prompt_column and ended and len(turns) == len(probe) and len(replies) > 1


def _preferences(source: str, prompt: str | None, probe: Sequence[Row], chosen: str) -> UserError:
    how = f"Set answer_column={chosen} to take the preferred replies as answers, or null if your reward needs none."
    if prompt is None and any(_is_conversation(row.get(chosen)) for row in probe):
        how = f"Set prompt_column={chosen}, of which the last reply is left out. {how}"
    elif prompt is None:
        how = f"Add a column 'prompt'. {how}"
    return UserError(
        f"{source} is preference data: its columns {chosen!r} and 'rejected' are for DPO, while GRPO samples replies "
        f"of its own and scores them. {how}"
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


def with_heads(paths: Sequence[str]) -> list[str]:
    """Return paths and the columns that they lead into."""
    return list(dict.fromkeys(name for path in paths for name in (path, path.split(".")[0])))


def _first_text_column(names: Sequence[str], probe: Sequence[Row]) -> str | None:
    """Return the first column that holds only texts, and at least one."""
    held = ((name, [row.get(name) for row in probe if row.get(name) is not None]) for name in names)
    return next((name for name, values in held if values and all(isinstance(one, str) for one in values)), None)


def _first_present(paths: Sequence[str], probe: Sequence[Row]) -> str | None:
    return next((path for path in paths if any(lookup(row, path) is not None for row in probe)), None)


def _text(value: object, column: str) -> str | None:
    """Return a value's text, or None if it is blank. Raises ValueError if it is neither text nor a number."""
    if value is None or isinstance(value, str):
        return value if value and value.strip() else None
    if isinstance(value, int | float):
        return str(value)
    raise ValueError(f"column {column!r} holds {_kind(value)}, not text or messages. Correct the data.")


def is_message(value: object) -> bool:
    """Return whether a value is a turn of a conversation: `role` and `content`, or ShareGPT's `from` and `value`."""
    return isinstance(value, Mapping) and any(value.keys() >= keys for keys in (_SHAREGPT, _TURN))


def _is_conversation(value: object) -> bool:
    """Return whether a value is a list of messages."""
    return isinstance(value, list) and bool(value) and all(map(is_message, value))


def _without_none(value: Any) -> Any:
    """Return a value without the keys that are None, which Arrow adds where other rows have them."""
    if isinstance(value, Mapping):
        return {key: _without_none(one) for key, one in value.items() if one is not None}
    return [_without_none(one) for one in value] if isinstance(value, list) else value


def _role(message: Mapping[str, object]) -> str:
    if message.keys() >= _SHAREGPT:
        return _ROLES.get(str(message["from"]), str(message["from"]))
    return str(message["role"])


def _content(message: Mapping[str, object]) -> object:
    return message["value" if message.keys() >= _SHAREGPT else "content"]


def _message(item: object) -> dict[str, str]:
    if not isinstance(item, Mapping) or not is_message(item):
        raise ValueError(f"a list holds {_kind(item)}, not messages with 'role' and 'content'. Correct the data.")
    content = _content(item) or ""
    if isinstance(content, list):
        parts = [part.get("text") if isinstance(part, Mapping) else part for part in content]
        texts = [part for part in parts if isinstance(part, str)]
        if len(texts) < len(parts):
            raise ValueError("a message holds parts other than text, which is all that is supported. Remove the row.")
        content = "".join(texts)
    return {"role": _role(item), "content": str(content)}


def _kind(value: object) -> str:
    return f"an object with keys {sorted(value)}" if isinstance(value, Mapping) else f"a {type(value).__name__}"
