"""Detects which columns of a data set hold the prompt, the reference answer and the row's id (see `PromptFile`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from datamodules.answers import AnswerFormat, boxed_answer, gsm8k_answer
from datamodules.errors import UserError, nearest
from datamodules.prompts.choices import CHOICE_ANSWERS, CHOICES, Naming, naming_of
from datamodules.prompts.messages import content_of, is_conversation, role_of
from datamodules.prompts.schemas import CONVERSATIONS, PREFERENCES, SUBSET_ID, Schema, choices_in, lookup
from datamodules.prompts.tables import Row
from datamodules.types import REWARD_ARGUMENTS

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

_SYSTEM = ("system", "system_prompt")
"""Columns that hold each row's own system message."""

_TOOLS = "tools"
"""Column with the functions that a row's chat template describes."""

_LETTERS = ("A", "B", "C", "D", "E", "F", "G", "H", "I", "J")
"""Columns of a table of multiple-choice questions, a column per choice."""

_NESTED = ("question.choices",)
"""Choices of the files in which `question` is an object."""

_CONTEXT = "context"

_AFTER_INSTRUCTION = ("input", _CONTEXT, "question", "problem", "query")
"""Columns that an `instruction` is about, in order of preference: Alpaca's `input`, Dolly's `context`."""

PROBE = 64
"""Number of rows that the schema is detected from."""


@dataclass(frozen=True, slots=True)
class SchemaOverrides:
    """Columns named by the user. Paths may be dotted (`extra_info.question`).

    Prompt and id are detected where they are None, the answer where it is "auto"; None says that rows need no answer.
    """

    prompt_column: str | None = None
    answer_column: str | None = "auto"
    answer_format: Literal["auto", "verbatim", "gsm8k", "boxed", "set"] = "auto"
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
        if answer is None and folded.keys() >= PREFERENCES:
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
    if prompt is None:
        found, accepted = ", ".join(map(repr, columns)), ", ".join(map(repr, PROMPTS))
        hint = f"={folded['text']} if it holds prompts: text for pretraining has none" if "text" in folded else ""
        raise UserError(
            f"{source} has no prompt column: its columns are {found}; expected one of {accepted}. "
            f"Set prompt_column{hint}."
        )
    parts = () if overrides.prompt_column else _parts(prompt, names, probe)
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
        parts=parts,
        choices=choices,
        naming=naming,
        ends_with_answer=ends_with_answer,
        system=_first_text_column([name for name in _SYSTEM if name in columns and name != prompt], probe),
        tools=_TOOLS if _TOOLS in columns and _first_present([_TOOLS], probe) else None,
    )
    if overrides.answer_format == "auto" and naming is None:
        schema = replace(schema, answer_format=_format(schema, probe))
    used = {prompt.split(".")[0], schema.answer, *parts, *choices, schema.system, schema.tools}
    candidates = [name for name in (*PROMPTS, _CONTEXT, *CHOICES) if name in columns]
    candidates = [] if overrides.prompt_column or SUBSET_ID in columns else candidates
    others = columns if overrides.answer_column == "auto" and schema.answer is None and not choices else []
    return replace(
        schema,
        unused=tuple(name for name in candidates if name not in used),
        others=tuple(name for name in others if name not in {*used, *candidates, schema.id, *REWARD_ARGUMENTS}),
    )


def _parts(prompt: str, names: Mapping[str, str], probe: Sequence[Row]) -> tuple[str, ...]:
    """Return the columns whose texts make the prompt together; empty if it is one alone.

    Args:
        prompt: the column that was found.
        names: columns by the names under which they are looked for.
        probe: the first rows.
    """
    texts = {key for key, name in names.items() if all(isinstance(row.get(name), str | None) for row in probe)}
    key = next((key for key, name in names.items() if name == prompt), prompt)
    if key == "instruction":
        about = next((names[name] for name in _AFTER_INSTRUCTION if name in texts), None)
        return () if about is None else (prompt, about)
    return (names[_CONTEXT], prompt) if key in _AFTER_INSTRUCTION and texts >= {key, _CONTEXT} else ()


def _format(schema: Schema, probe: Sequence[Row]) -> AnswerFormat:
    """Return how the answers of the first rows are written."""
    written = [text for row in probe if isinstance(text := schema.written_answer(row), str)]
    if written and all(gsm8k_answer(text) is not None for text in written):
        return "gsm8k"
    boxed = schema.answer == "solution" or (written and all(boxed_answer(text) is not None for text in written))
    return "boxed" if boxed else "verbatim"


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
        choices = [choices_in(row, path) for row in probe]
        readable = [(one, row) for one, row in zip(choices, probe, strict=True) if one is not None]
        if not readable or len(readable) < len(choices):
            continue
        if overrides.answer_column is None:
            return path, None, None
        for answer in dict.fromkeys(folded.get(name.lower(), name) for name in answers):
            if naming := naming_of([(one, lookup(row, answer)) for one, row in readable]):
                return path, answer, naming
    return (), None, None


def _ends_with_answer(prompt: str, probe: Sequence[Row], overrides: SchemaOverrides) -> bool:
    """Return whether the last turns of conversations are answers.

    Those of a `prompt` may also be the start of a reply, which the policy continues. Such a start is the same in all
    rows, and a column that the user names is the whole prompt.
    """
    turns = [value[-1] for row in probe if isinstance(value := lookup(row, prompt), list) and is_conversation(value)]
    replies = {str(content_of(one)) for one in turns if role_of(one) == "assistant" and content_of(one)}
    if prompt.lower() in CONVERSATIONS:
        return bool(replies)
    ended = all(role_of(one) == "assistant" for one in turns)
    return not overrides.prompt_column and ended and len(turns) == len(probe) and len(replies) > 1


def _preferences(source: str, prompt: str | None, probe: Sequence[Row], chosen: str) -> UserError:
    how = f"Set answer_column={chosen} to take the preferred replies as answers, or null if your reward needs none."
    if prompt is None and any(is_conversation(row.get(chosen)) for row in probe):
        how = f"Set prompt_column={chosen}, of which the last reply is left out. {how}"
    elif prompt is None:
        how = f"Add a column 'prompt'. {how}"
    return UserError(
        f"{source} is preference data: its columns {chosen!r} and 'rejected' are for DPO, while GRPO samples replies "
        f"of its own and scores them. {how}"
    )


def _first_text_column(names: Sequence[str], probe: Sequence[Row]) -> str | None:
    """Return the first column that holds only texts, and at least one."""
    held = ((name, [row.get(name) for row in probe if row.get(name) is not None]) for name in names)
    return next((name for name, values in held if values and all(isinstance(one, str) for one in values)), None)


def _first_present(paths: Sequence[str], probe: Sequence[Row]) -> str | None:
    return next((path for path in paths if any(lookup(row, path) is not None for row in probe)), None)
