"""Renders a question into the text that the policy reads."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jinja2 import Environment
from transformers import PreTrainedTokenizerBase

from datamodules.errors import UserError, nearest
from datamodules.fields import fields_of, filled
from datamodules.prompts.bounded import bounded
from datamodules.prompts.choices import CHOICES, choices_of
from datamodules.prompts.messages import question_of
from datamodules.prompts.schemas import SUBSET_ID, Schema, lookup
from datamodules.prompts.tables import Row
from datamodules.types import Messages

Tools = Mapping[str, list[dict[str, Any]]]
"""JSON schemas of tools, by the name of their environment; "" for a single one."""

_FIELDS = ("question", "system_prompt")
_NAME = re.compile(r"[^\W\d][^\[\]{}!:]*")

_MAX_CHARACTERS_PER_TOKEN = 1000
"""More than any vocabulary's longest entry has."""


@dataclass(frozen=True, slots=True)
class Rendered:
    """A rendered prompt.

    Attributes:
        prompt: what a reward function receives: `text`, or the messages of conversational data with their system
            message.
        text: what is tokenised.
    """

    prompt: str | Messages
    text: str


def check_template(template: str) -> None:
    """Check that a template is a format string with `{question}`, `{system_prompt}` or columns of the data.

    Raises:
        UserError: it is not.
    """
    try:
        fields = fields_of(template)
    except ValueError as error:
        raise UserError(f"template {template!r}: {error}. Write literal braces as {{{{ and }}}}.") from error
    if unknown := sorted(field for field in fields if not _NAME.fullmatch(field)):
        raise _unknown(template, unknown[0], "a column")
    if not fields - {"system_prompt"}:
        raise _no_question(template)
    try:
        with bounded() as start:
            start()
            filled(template, dict.fromkeys(fields, ""))
    except Exception as error:
        raise UserError(f"template {template!r}: {_said(error)}. Write the fields without a format.") from error


def check_columns(template: str, schema: Schema, columns: Sequence[str], rows: Sequence[Row], source: str) -> None:
    """Check that data has the columns that a template names, and that it names the question or what it is read from.

    Raises:
        UserError: it does not.
    """
    fields = fields_of(template)
    for field in sorted(fields - set(_FIELDS)):
        if field not in columns and not any(lookup(row, field) is not None for row in rows):
            raise _unknown(template, field, f"a column of {source} ({', '.join(map(repr, columns))})")
    if schema.answer in fields and not schema.ends_with_answer:
        raise UserError(
            f"template {template!r} names {schema.answer!r}, so that the policy would read the answer. Remove it."
        )
    # A subset holds its questions under another name than the data that it was chosen from, which were checked.
    if schema.id != SUBSET_ID and not fields & {"question", *schema.prompt_sources}:
        raise _no_question(template)


def _unknown(template: str, field: str, columns: str) -> UserError:
    return UserError(
        f"template {template!r}: field {field!r} is unknown, expected one of {_FIELDS} or {columns}. "
        "Write literal braces as {{ and }}."
    )


def _no_question(template: str) -> UserError:
    return UserError(f"template {template!r} has no field {{question}}. Put it where the question belongs.")


def _written(row: Row, field: str) -> str:
    """Return a column as a template shows it: choices as lettered lines, other lists and objects as JSON."""
    value = lookup(row, field)
    if field in CHOICES and (choices := choices_of(value)):
        return str(choices)
    if value is None or isinstance(value, str | int | float):
        return "" if value is None else str(value)
    return json.dumps(value, ensure_ascii=False, default=str)


class Renderer:
    """Applies a plain template if there is one, else the tokenizer's chat template if it has one, else plain text.

    Plain text is the question, preceded by the system prompt and an empty line. Without a chat template, a
    conversation of several turns becomes lines `User: ...` and `Assistant: ...`, ending with `Assistant:`.

    Args:
        tokenizer: the policy's tokenizer.
        template: format string with `{question}` and columns of the data; None to use the chat template, if any.
        system_prompt: goes first, unless the conversation has its own system message.
        chat_template_kwargs: arguments of the chat template (e.g. `enable_thinking`).
        tools: functions for the chat template of rows that have none of their own: the tools of environments, by the
            name in a row's column `environment`, or "" for a single one. None without an environment.

    Attributes:
        columns: columns of the data that the template names, as paths.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        template: str | None = None,
        system_prompt: str | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        tools: Tools | None = None,
    ) -> None:
        if template is not None:
            check_template(template)
        self.tools = tools
        self.tokenizer, self.template, self.system_prompt = tokenizer, template, system_prompt
        self.chat_template_kwargs = dict(chat_template_kwargs or {})
        self._keeps_system: bool | None = None  # not known yet
        self._powers_checked: set[bool] = set()  # by whether functions are described: they may have their own template
        self._fields: frozenset[str] = frozenset() if template is None else frozenset(fields_of(template))
        self.columns = sorted(self._fields - set(_FIELDS))
        if self.chat_template_kwargs:
            self._check_chat_template_kwargs()

    @property
    def uses_chat_template(self) -> bool:
        return self.template is None and self.tokenizer.chat_template is not None

    def reads(self, name: str) -> bool:
        """Return whether the chat template shows what is given under a name, such as `tools` or `tool_calls`."""
        return self.uses_chat_template and re.search(rf"\b{name}\b", self._chat_template([])) is not None

    def render(self, row: Row, schema: Schema, added: str = "") -> Rendered | None:
        """Render a row; None if it has no prompt.

        Args:
            row: of the data.
            schema: of the data.
            added: text that is added to the last user message, if the row has one.

        Raises:
            UserError: the chat template rejects it.
            ValueError: a column is not what it should be.
        """
        prompt = schema.prompt_of(row)
        if prompt is None:
            return None
        if isinstance(prompt, str):
            prompt += added
        elif added:
            prompt = [*prompt[:-1], {**prompt[-1], "content": prompt[-1]["content"] + added}]
        system = None if schema.system in self.columns else schema.system_of(row)
        return self(prompt, system, schema.tools_of(row) or self._tools_of(row), row)

    def _tools_of(self, row: Row) -> list[dict[str, Any]] | None:
        """Return the tools of the environment that a row is for. Raises UserError if it names none."""
        if self.tools is None:
            return None
        name = "" if "" in self.tools else str(row.get("environment"))
        if name not in self.tools:
            raise UserError(
                f"A row's column environment is {name!r}, expected one of {', '.join(self.tools)}, the environments of "
                f"model.environment: {nearest(name, self.tools)}"
            )
        return self.tools[name] or None

    def __call__(
        self,
        prompt: str | Messages,
        system: str | None = None,
        tools: list[dict[str, Any]] | None = None,
        row: Row | None = None,
    ) -> Rendered:
        """Render a question or a conversation.

        Args:
            prompt: the question or the messages.
            system: system message of a conversation that has none, in place of `system_prompt`.
            tools: functions for the chat template.
            row: columns that the template may name.

        Raises:
            UserError: the chat template rejects it.
        """
        system = system if system is not None else self.system_prompt
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        own = [message["content"] for message in messages if message["role"] == "system"]
        if self.template is not None:
            system = "\n\n".join(own) or system or ""
            values = {"question": question_of(prompt), "system_prompt": system}
            values |= {name: _written(row or {}, name) for name in self.columns}
            text = filled(self.template, values)
            if system and "system_prompt" not in self._fields:
                text = f"{system}\n\n{text}"
            return Rendered(text, text)
        if system is not None and not own:
            messages = [{"role": "system", "content": system}, *messages]
        if self.uses_chat_template:
            text = self._apply_chat_template(messages, tools)
            if self._keeps_system is None and (own or system is not None):
                self._check_system(messages, text, tools)
        else:
            text = _as_text(messages)
        return Rendered(text if isinstance(prompt, str) else messages, text)

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Tokenise rendered texts. Special tokens are added to plain text only: a chat template has its own.

        A text that has the first token of all texts already gets no second one, and none gets an end token.
        """
        if not texts:
            return []
        encoded: list[list[int]] = self.tokenizer(list(texts), add_special_tokens=not self.uses_chat_template)[
            "input_ids"
        ]
        begin, end = self.tokenizer.bos_token_id, self.tokenizer.eos_token_id
        for row, (ids, text) in enumerate(zip(encoded, texts, strict=True)):
            # Some tokenizers append the end token to every text, which would leave the policy nothing to generate.
            own_end = text.endswith(str(self.tokenizer.eos_token)) and ids[-2:-1] != [end]
            appended = not self.uses_chat_template and len(ids) > 1 and ids[-1] == end and not own_end
            encoded[row] = ids[begin is not None and ids[:2] == [begin] * 2 : len(ids) - appended]
        return encoded

    def fit(self, texts: Sequence[str], limit: int) -> list[bool]:
        """Return for each rendered text whether it has at most `limit` tokens.

        Only texts whose number of characters leaves that open are tokenised.
        """
        # No tokenizer makes more tokens of ASCII than characters, but for special tokens and one leading space.
        short = limit - self.tokenizer.num_special_tokens_to_add() - 1
        fits = [len(text) <= short and text.isascii() for text in texts]
        unsure = [
            place
            for place, text in enumerate(texts)
            if not fits[place] and len(text) <= limit * _MAX_CHARACTERS_PER_TOKEN
        ]
        for place, ids in zip(unsure, self.encode([texts[place] for place in unsure]), strict=True):
            fits[place] = len(ids) <= limit
        return fits

    def _chat_template(self, tools: list[dict[str, Any]] | None = None) -> str:
        """Return the chat template that is used. Raises ValueError if there are several and none is the default."""
        return self.tokenizer.get_chat_template(self.chat_template_kwargs.get("chat_template"), tools=tools)

    def _apply_chat_template(self, messages: Messages, tools: list[dict[str, Any]] | None = None) -> str:
        continued = messages[-1]["role"] == "assistant"  # the policy continues a given start of a reply
        try:
            if (described := tools is not None) not in self._powers_checked:
                _refuse_powers(self._chat_template([] if described else None))
                self._powers_checked.add(described)
            text = self.tokenizer.apply_chat_template(
                messages,
                tools=None if tools is None else list(tools),  # of a wider type
                tokenize=False,
                add_generation_prompt=not continued,
                continue_final_message=continued,
                **self.chat_template_kwargs,
            )
        except Exception as error:  # a template is code: it may raise anything
            roles = ", ".join(message["role"] for message in messages)
            raise UserError(
                f"The chat template rejects messages with the roles {roles}: {_said(error)}. Set a plain template."
            ) from error
        assert isinstance(text, str), "tokenize=False gives text"
        return text

    def _check_system(self, messages: Messages, text: str, tools: list[dict[str, Any]] | None) -> None:
        """Check that another system message gives another text. Raises UserError if the template leaves it out."""
        others = [{**one, "content": one["content"] + "."} if one["role"] == "system" else one for one in messages]
        self._keeps_system = self._apply_chat_template(others, tools) != text
        if not self._keeps_system:
            raise UserError(
                "The chat template leaves out system messages, so the policy would not read system_prompt or those of "
                "the data. Remove them, or set a plain template with {system_prompt}."
            )

    def _check_chat_template_kwargs(self) -> None:
        """Raise UserError unless a chat template is used that names all of `chat_template_kwargs`."""
        given = ", ".join(map(repr, self.chat_template_kwargs))
        if not self.uses_chat_template:
            why = "the tokenizer has no chat template" if self.template is None else "template replaces it"
            raise UserError(f"chat_template_kwargs has {given}, but no chat template is used: {why}. Remove them.")
        try:
            used = self._chat_template()
        except ValueError as error:  # several templates, and none is the default
            raise UserError(f"The chat template cannot be chosen: {_said(error)}") from error
        names = {"chat_template", *re.findall(r"[^\W\d]\w*", used)}
        for name in self.chat_template_kwargs:
            if name not in names:
                hint = nearest(name, names)
                hint = f" {hint[:1].upper()}{hint[1:]}" if hint.startswith("did you mean") else ""
                raise UserError(f"chat_template_kwargs has {name!r}, which the chat template does not use.{hint}")


def _refuse_powers(template: str) -> None:
    """Raise ValueError if a chat template raises numbers to powers, of itself or to round them.

    Such a power is one operation that no limit on time can interrupt, and Jinja computes it even while it compiles.
    """
    tokens = [(kind, value) for _, kind, value in Environment().lex(template) if kind != "whitespace"]
    if ("operator", "**") in tokens:
        raise ValueError("it uses the operator **, which may take any time")
    rounding = [("operator", "|"), ("name", "round"), ("operator", "(")]
    if any(tokens[place : place + 3] == rounding for place in range(len(tokens))):
        raise ValueError("it rounds to a number of places, which may take any time")


def _said(error: Exception) -> str:
    """Return an exception's first line, with its type unless it is the template's own refusal."""
    line = " ".join(str(error).split())[:300]
    return line if type(error).__name__ == "TemplateError" else f"{type(error).__name__}: {line}".removesuffix(": ")


def _as_text(messages: Messages) -> str:
    system = "".join(message["content"] + "\n\n" for message in messages if message["role"] == "system")
    turns = [message for message in messages if message["role"] != "system"]
    if len(turns) == 1:
        return system + turns[0]["content"]
    lines = [f"{turn['role'].capitalize()}: {turn['content']}" for turn in turns]
    if turns[-1]["role"] != "assistant":
        lines.append("Assistant:")
    return system + "\n".join(lines)
