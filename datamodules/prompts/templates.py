"""From a question to what the policy reads."""

from __future__ import annotations

import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from datamodules.errors import UserError
from datamodules.prompts.schemas import question_of
from datamodules.types import Messages

_FIELDS = ("question", "system_prompt")


@dataclass(frozen=True, slots=True)
class Rendered:
    """A prompt in its final form.

    Attributes:
        prompt: what a reward function sees: `text`, or the messages of conversational data (system message included).
        text: what is tokenised.
    """

    prompt: str | Messages
    text: str


def check_template(template: str) -> None:
    """Raises UserError unless the template is a format string with `{question}` (and perhaps `{system_prompt}`)."""
    try:
        fields = {field for _, field, _, _ in string.Formatter().parse(template) if field is not None}
    except ValueError as error:
        raise UserError(f"template {template!r}: {error}; write literal braces as {{{{ and }}}}") from error
    if unknown := sorted(fields - set(_FIELDS)):
        raise UserError(
            f"template {template!r}: field {unknown[0]!r} is none of {_FIELDS}; write literal braces as {{{{ and }}}}"
        )
    if "question" not in fields:
        raise UserError(f"template {template!r}: expected the field {{question}} in it")


class Renderer:
    """Applies a plain template, else the tokenizer's chat template, else plain text.

    Plain text is the question itself; a system prompt comes before it, with an empty line between. A conversation of
    several turns without a chat template becomes lines `User: ...`, `Assistant: ...`, ending with `Assistant:`.

    Args:
        tokenizer: the policy's.
        template: format string with `{question}`; None for the chat template, if there is one.
        system_prompt: put first, unless a conversation has a system message of its own.
        chat_template_kwargs: passed on to the chat template (e.g. `enable_thinking`).
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
        self.tokenizer = tokenizer
        self.template = template
        self.system_prompt = system_prompt
        self.chat_template_kwargs = dict(chat_template_kwargs or {})

    @property
    def uses_chat_template(self) -> bool:
        return self.template is None and self.tokenizer.chat_template is not None

    def __call__(self, prompt: str | Messages) -> Rendered:
        """Renders a question or a conversation. Raises UserError when the chat template refuses it."""
        if self.template is not None:
            text = self._fill_template(question_of(prompt))
            return Rendered(text, text)
        messages = self._with_system(prompt)
        text = self._chat(messages) if self.uses_chat_template else _as_text(messages)
        return Rendered(text if isinstance(prompt, str) else messages, text)

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of rendered texts. Special tokens are added to plain text only: a chat template has its own."""
        if not texts:
            return []
        encoded = self.tokenizer(list(texts), add_special_tokens=not self.uses_chat_template)["input_ids"]
        end = self.tokenizer.eos_token_id
        if self.uses_chat_template or end is None:
            return encoded
        # Some tokenizers close every text with the end token, after which a policy has nothing left to say.
        closed = [len(ids) > 1 and ids[-1] == end for ids in encoded]
        said = [text.endswith(str(self.tokenizer.eos_token)) for text in texts]
        return [ids[:-1] if cut and not keep else ids for ids, cut, keep in zip(encoded, closed, said, strict=True)]

    def _fill_template(self, question: str) -> str:
        assert self.template is not None
        system = self.system_prompt or ""
        text = self.template.format(question=question, system_prompt=system)
        if system and not any(field == "system_prompt" for _, field, _, _ in string.Formatter().parse(self.template)):
            return f"{system}\n\n{text}"
        return text

    def _with_system(self, prompt: str | Messages) -> Messages:
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        if self.system_prompt is None or any(message["role"] == "system" for message in messages):
            return messages
        return [{"role": "system", "content": self.system_prompt}, *messages]

    def _chat(self, messages: Messages) -> str:
        begun = messages[-1]["role"] == "assistant"  # a reply that the policy is to go on with
        try:
            text = self.tokenizer.apply_chat_template(
                messages,
                tokenize=False,
                add_generation_prompt=not begun,
                continue_final_message=begun,
                **self.chat_template_kwargs,
            )
        except TemplateError as error:
            roles = ", ".join(message["role"] for message in messages)
            raise UserError(f"the chat template refuses messages of {roles}: {error}; set a plain template") from error
        assert isinstance(text, str), "tokenize=False gives text"
        return text


def _as_text(messages: Messages) -> str:
    system = "".join(message["content"] + "\n\n" for message in messages if message["role"] == "system")
    turns = [message for message in messages if message["role"] != "system"]
    if len(turns) == 1:
        return system + turns[0]["content"]
    lines = [f"{turn['role'].capitalize()}: {turn['content']}" for turn in turns]
    if turns[-1]["role"] != "assistant":
        lines.append("Assistant:")
    return system + "\n".join(lines)
