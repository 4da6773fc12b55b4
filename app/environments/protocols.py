"""How the policy writes tool calls, and how what an environment says is written as tokens that follow the policy's."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from transformers import PreTrainedTokenizerBase

from app.environments.markup import Parsed, parse_hermes, parse_llama, parse_plain
from app.environments.options import Plain
from datamodules.errors import UserError
from datamodules.types import Messages

Schemas = Sequence[Mapping[str, Any]]
_MARK = "DotsDummyTurn"
"""What the assistant says in the conversation from which the tokens of replies are derived."""


class Protocol(ABC):
    """Reads the policy's turns, and writes what is said to it as tokens.

    Attributes:
        stop: strings at which a turn of the policy ends, as part of it.
        end_ids: tokens that end a turn of the policy by the chat template; empty if `stop` or the tokenizer's own end
            token does.
    """

    stop: list[str]
    end_ids: frozenset[int]

    @abstractmethod
    def parse(self, text: str) -> Parsed:
        """Find the tool calls in a turn of the policy.

        Args:
            text: decoded, with or without special tokens.

        Returns:
            The text without the calls, the calls, and what is wrong with each further one that cannot be read.
        """

    @abstractmethod
    def reply_ids(self, messages: Messages, last_token_is_end: bool) -> list[int]:
        """Return the tokens to append after the policy's own, up to its next turn.

        Args:
            messages: what the environment says, at least one message.
            last_token_is_end: whether the policy's last token is one of `end_ids`; if not, its turn is closed first.
        """


def protocol_of(
    given: Literal["auto", "hermes", "llama"] | Plain,
    tokenizer: PreTrainedTokenizerBase,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    schemas: Schemas = (),
) -> Protocol:
    """Return the protocol of an environment.

    Args:
        given: `EnvironmentOptions.protocol`.
        tokenizer: the policy's.
        chat_template_kwargs: arguments of the chat template.
        schemas: the environment's tools, as chat templates take them.

    Raises:
        UserError: the chat template shows no known way to write tool calls, or cannot write what tools return.
    """
    if isinstance(given, Plain):
        return PlainProtocol(given, tokenizer)
    kwargs = dict(chat_template_kwargs or {})
    try:
        described = [dict(one) for one in schemas] or None  # there may be a template for prompts with tools
        template = tokenizer.get_chat_template(kwargs.pop("chat_template", None), tools=described)
    except ValueError as error:
        raise UserError(
            "The tokenizer has no chat template that says how the policy's turns are written. Set "
            "model.environment.protocol to plain strings: {start: <calc>, end: </calc>, tool: ..., argument: ...}."
        ) from error
    markup = _shown(template) if given == "auto" else given
    if markup is None and schemas:
        raise UserError(
            "The chat template shows no tool calls as Qwen, Hermes (<tool_call>) or Llama 3.1 write them, so it is not "
            "known how the policy calls tools. Set model.environment.protocol to hermes, llama or plain strings: "
            "{start: <calc>, end: </calc>, tool: ..., argument: ...}."
        )
    return ChatProtocol(markup, tokenizer, template, kwargs, schemas)


def _shown(template: str) -> Literal["hermes", "llama"] | None:
    """Return the way to write tool calls that a chat template shows."""
    if "<tool_call>" in template and "<arg_key>" not in template:
        return "hermes"
    return "llama" if '"parameters": ' in template and "ipython" in template else None


class PlainProtocol(Protocol):
    """Calls between two strings; replies by a string."""

    def __init__(self, plain: Plain, tokenizer: PreTrainedTokenizerBase) -> None:
        self.stop, self.end_ids = [plain.end], frozenset()
        self._plain, self._tokenizer = plain, tokenizer

    def parse(self, text: str) -> Parsed:
        return parse_plain(text, self._plain.start, self._plain.end, self._plain.tool, self._plain.argument)

    def reply_ids(self, messages: Messages, last_token_is_end: bool) -> list[int]:
        text = "".join(self._plain.reply.replace("{content}", message["content"]) for message in messages)
        return _ids(self._tokenizer, text)


class ChatProtocol(Protocol):
    """Calls in the markup of a family of models; replies as the chat template writes them.

    Args:
        markup: how calls are written; None if there are no tools.
        tokenizer: the policy's.
        template: the chat template.
        kwargs: its arguments.
        schemas: the tools.
    """

    def __init__(
        self,
        markup: Literal["hermes", "llama"] | None,
        tokenizer: PreTrainedTokenizerBase,
        template: str,
        kwargs: Mapping[str, Any],
        schemas: Schemas,
    ) -> None:
        self._tokenizer, self._template, self._kwargs = tokenizer, template, kwargs
        functions = [one.get("function", {}) for one in schemas]
        texts = {
            one["name"]: {
                name
                for name, described in one.get("parameters", {}).get("properties", {}).items()
                if described.get("type") == "string"
            }
            for one in functions
        }
        parsers: dict[str | None, Callable[[str], Parsed]] = {
            "hermes": lambda text: parse_hermes(text, texts),
            "llama": parse_llama,
            None: lambda text: (text, [], []),
        }
        self._parse = parsers[markup]
        self.stop = []
        said = self._render([{"role": "assistant", "content": _MARK}], prompted=False)
        closing = _ids(tokenizer, said.rpartition(_MARK)[2])
        known = set(tokenizer.get_added_vocab().values()) | set(tokenizer.all_special_ids)
        if not closing or closing[0] not in known:
            raise UserError(
                "The chat template does not end the assistant's turns by a token of its own, so it cannot be used in "
                "an environment. Use another chat template, or set model.environment.protocol to plain strings."
            )
        self._end_id = closing[0]
        self._end = str(tokenizer.convert_ids_to_tokens(self._end_id))
        more = tokenizer.get_added_vocab().get("<|eom_id|>") if markup == "llama" else None  # of a call, in Llama 3.1
        self.end_ids = frozenset({self._end_id} if more is None else {self._end_id, more})
        self._ends = tuple(str(tokenizer.convert_ids_to_tokens(one)) for one in self.end_ids)
        self._check("user" if markup is None else "tool")

    def parse(self, text: str) -> Parsed:
        for end in self._ends:
            text = text.removesuffix(end)
        return self._parse(text)

    def reply_ids(self, messages: Messages, last_token_is_end: bool) -> list[int]:
        _, reply = self._split(messages)
        return [*([] if last_token_is_end else [self._end_id]), *_ids(self._tokenizer, reply)]

    def _split(self, messages: Messages) -> tuple[str, str]:
        """Return a conversation up to the end of the assistant's turn, and what the messages add to it."""
        turn: dict[str, Any] = {"role": "assistant", "content": _MARK}
        tool = next((message for message in messages if message["role"] == "tool"), None)
        if tool is not None:
            # Templates write the content, the call, or both; one call, because Llama's refuses several.
            function = {"name": tool.get("name") or "tool", "arguments": {"argument": _MARK}}
            turn["tool_calls"] = [{"type": "function", "function": function}]
        whole = self._render([turn, *messages], prompted=True)
        cut = whole.index(self._end, whole.index(_MARK)) + len(self._end)
        return whole[:cut], whole[cut:]

    def _render(self, messages: Messages, prompted: bool) -> str:
        try:
            text = self._tokenizer.apply_chat_template(
                [{"role": "user", "content": "?"}, *messages],
                chat_template=self._template,
                tokenize=False,
                add_generation_prompt=prompted,
                **self._kwargs,
            )
        except Exception as error:  # a template is code: it may raise anything
            roles = ", ".join(message["role"] for message in messages)
            said = " ".join(str(error).split())[:300]
            raise UserError(
                f"The chat template rejects messages with the roles user, {roles}: {said}. Use another chat template, "
                "or set model.environment.protocol to plain strings."
            ) from error
        assert isinstance(text, str), "tokenize=False gives text"
        return text

    def _check(self, role: str) -> None:
        """Check that a reply is written as the same tokens by itself as within the conversation."""
        before, reply = self._split([{"role": role, "name": "tool", "content": "12"}])
        apart = [*_ids(self._tokenizer, before), *_ids(self._tokenizer, reply)]
        if _MARK in reply or "12" not in reply or _ids(self._tokenizer, before + reply) != apart:
            raise UserError(
                f"The chat template does not write messages of the role {role!r} after the assistant's turn, or the "
                "tokenizer joins them with it. Use another chat template, or set model.environment.protocol to plain "
                "strings."
            )


def _ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids
