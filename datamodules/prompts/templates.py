"""Renders a question into the text that the policy reads."""

from __future__ import annotations

import re
import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jinja2 import Environment
from transformers import PreTrainedTokenizerBase

from datamodules.errors import UserError, nearest
from datamodules.prompts.bounded import bounded
from datamodules.prompts.schemas import question_of
from datamodules.types import Messages

_FIELDS = ("question", "system_prompt")

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
    """Check that a template is a format string with `{question}` and, optionally, `{system_prompt}`.

    Raises:
        UserError: it is not.
    """
    try:
        fields = _fields(template)
    except ValueError as error:
        raise UserError(f"template {template!r}: {error}. Write literal braces as {{{{ and }}}}.") from error
    if unknown := sorted(fields - set(_FIELDS)):
        raise UserError(
            f"template {template!r}: field {unknown[0]!r} is unknown, expected one of {_FIELDS}. "
            "Write literal braces as {{ and }}."
        )
    if "question" not in fields:
        raise UserError(f"template {template!r} has no field {{question}}. Put it where the question belongs.")
    try:
        with bounded() as start:
            start()
            template.format(question="", system_prompt="")
    except Exception as error:
        raise UserError(f"template {template!r}: {_said(error)}. Write the fields without a format.") from error


def _fields(template: str) -> set[str]:
    return {field for _, field, _, _ in string.Formatter().parse(template) if field is not None}


class Renderer:
    """Applies a plain template if there is one, else the tokenizer's chat template if it has one, else plain text.

    Plain text is the question, preceded by the system prompt and an empty line. Without a chat template, a
    conversation of several turns becomes lines `User: ...` and `Assistant: ...`, ending with `Assistant:`.

    Args:
        tokenizer: the policy's tokenizer.
        template: format string with `{question}`; None to use the chat template, if any.
        system_prompt: goes first, unless the conversation has its own system message.
        chat_template_kwargs: arguments of the chat template (e.g. `enable_thinking`).
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        template: str | None = None,
        system_prompt: str | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        if template is not None:
            check_template(template)
        self.tokenizer, self.template, self.system_prompt = tokenizer, template, system_prompt
        self.chat_template_kwargs = dict(chat_template_kwargs or {})
        self._keeps_system: bool | None = None  # not known yet
        self._powers_checked = False
        if self.chat_template_kwargs:
            self._check_chat_template_kwargs()

    @property
    def uses_chat_template(self) -> bool:
        return self.template is None and self.tokenizer.chat_template is not None

    def __call__(self, prompt: str | Messages) -> Rendered:
        """Render a question or a conversation.

        Raises:
            UserError: the chat template rejects it.
        """
        if self.template is not None:
            system = self.system_prompt or ""
            text = self.template.format(question=question_of(prompt), system_prompt=system)
            if system and "system_prompt" not in _fields(self.template):
                text = f"{system}\n\n{text}"
            return Rendered(text, text)
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        if self.system_prompt is not None and not any(message["role"] == "system" for message in messages):
            messages = [{"role": "system", "content": self.system_prompt}, *messages]
        if self.uses_chat_template:
            text = self._apply_chat_template(messages)
            if self._keeps_system is None and any(message["role"] == "system" for message in messages):
                self._check_system(messages, text)
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

    def _apply_chat_template(self, messages: Messages) -> str:
        continued = messages[-1]["role"] == "assistant"  # the policy continues a given start of a reply
        try:
            if not self._powers_checked:
                _refuse_powers(self.tokenizer.get_chat_template(self.chat_template_kwargs.get("chat_template")))
                self._powers_checked = True
            text = self.tokenizer.apply_chat_template(
                messages,
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

    def _check_system(self, messages: Messages, text: str) -> None:
        """Check that another system message gives another text. Raises UserError if the template leaves it out."""
        others = [{**one, "content": one["content"] + "."} if one["role"] == "system" else one for one in messages]
        self._keeps_system = self._apply_chat_template(others) != text
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
            used = self.tokenizer.get_chat_template(self.chat_template_kwargs.get("chat_template"))
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
