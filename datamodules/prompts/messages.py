"""Reads conversations: turns of `role` and `content`, or ShareGPT's of `from` and `value`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from datamodules.types import Messages

_ROLES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant", "model": "assistant"}
"""ShareGPT's names of roles, and those of its kin."""

_SHAREGPT, _TURN, _CALL = {"from", "value"}, {"role", "content"}, {"role", "tool_calls"}
"""Keys of a message."""

CALLS = "tool_calls"
_MORE = (CALLS, "tool_call_id", "name", "reasoning_content")
"""What a turn of an assistant or a tool may hold besides its content, which chat templates show."""


def is_message(value: object) -> bool:
    """Return whether a value is a turn of a conversation: `role` and `content`, or ShareGPT's `from` and `value`.

    A turn that calls functions may have no `content`.
    """
    return isinstance(value, Mapping) and any(value.keys() >= keys for keys in (_SHAREGPT, _TURN, _CALL))


def is_conversation(value: object) -> bool:
    """Return whether a value is a list of messages."""
    return isinstance(value, list) and bool(value) and all(map(is_message, value))


def role_of(message: Mapping[str, object]) -> str:
    """Return the role of a turn by the name that chat templates know."""
    if message.keys() >= _SHAREGPT:
        return _ROLES.get(str(message["from"]), str(message["from"]))
    return str(message["role"])


def content_of(message: Mapping[str, object]) -> object:
    """Return what a turn says, as the data have it."""
    return message.get("value" if message.keys() >= _SHAREGPT else "content")


def as_message(item: object) -> dict[str, Any]:
    """Return a turn as `role`, `content`, a text, and the function calls and results that chat templates show.

    Raises:
        ValueError: it is no turn, or its content is more than text.
    """
    if not isinstance(item, Mapping) or not is_message(item):
        raise ValueError(f"a list holds {kind_of(item)}, not messages with 'role' and 'content'. Correct the data.")
    content = content_of(item) or ""
    if isinstance(content, list):
        parts = [part.get("text") if isinstance(part, Mapping) else part for part in content]
        texts = [part for part in parts if isinstance(part, str)]
        if len(texts) < len(parts):
            raise ValueError("a message holds parts other than text, which is all that is supported. Remove the row.")
        content = "".join(texts)
    message: dict[str, Any] = {"role": role_of(item), "content": str(content)}
    if message["role"] in ("assistant", "tool"):
        message |= {name: without_none(item[name]) for name in _MORE if item.get(name)}
    if isinstance(message.get(CALLS), list):
        message[CALLS] = [_with_arguments(call) for call in message[CALLS]]
    return message


def _with_arguments(call: Any) -> Any:
    """Return a function call whose arguments are an object: templates write it as JSON, and a text as JSON text."""
    if not isinstance(call, Mapping):
        return call
    if isinstance(function := call.get("function"), Mapping):
        return {**call, "function": _with_arguments(function)}
    if isinstance(given := call.get("arguments"), str):
        try:
            return {**call, "arguments": json.loads(given)}
        except ValueError as error:
            raise ValueError(f"the arguments of a function call are not JSON ({error}). Correct the data.") from error
    return dict(call)


def without_none(value: Any) -> Any:
    """Return a value without the keys that are None, which Arrow adds where other rows have them."""
    if isinstance(value, Mapping):
        return {key: without_none(one) for key, one in value.items() if one is not None}
    return [without_none(one) for one in value] if isinstance(value, list) else value


def question_of(prompt: str | Messages) -> str:
    """Return the raw question: the text itself, or the user's last message."""
    if isinstance(prompt, str):
        return prompt
    questions = [message["content"] for message in prompt if message["role"] == "user"]
    return questions[-1] if questions else ""


def kind_of(value: object) -> str:
    """Return what a value is, for messages."""
    return f"an object with keys {sorted(value)}" if isinstance(value, Mapping) else f"a {type(value).__name__}"
