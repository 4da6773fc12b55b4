"""Reads conversations: turns of `role` and `content`, or ShareGPT's of `from` and `value`."""

from __future__ import annotations

from collections.abc import Mapping

from datamodules.types import Messages

_ROLES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant", "model": "assistant"}
"""ShareGPT's names of roles, and those of its kin."""

_SHAREGPT, _TURN = {"from", "value"}, {"role", "content"}
"""Keys of a message."""


def is_message(value: object) -> bool:
    """Return whether a value is a turn of a conversation: `role` and `content`, or ShareGPT's `from` and `value`."""
    return isinstance(value, Mapping) and any(value.keys() >= keys for keys in (_SHAREGPT, _TURN))


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
    return message["value" if message.keys() >= _SHAREGPT else "content"]


def as_message(item: object) -> dict[str, str]:
    """Return a turn as `role` and `content`, a text. Raises ValueError if it is none, or holds more than text."""
    if not isinstance(item, Mapping) or not is_message(item):
        raise ValueError(f"a list holds {kind_of(item)}, not messages with 'role' and 'content'. Correct the data.")
    content = content_of(item) or ""
    if isinstance(content, list):
        parts = [part.get("text") if isinstance(part, Mapping) else part for part in content]
        texts = [part for part in parts if isinstance(part, str)]
        if len(texts) < len(parts):
            raise ValueError("a message holds parts other than text, which is all that is supported. Remove the row.")
        content = "".join(texts)
    return {"role": role_of(item), "content": str(content)}


def question_of(prompt: str | Messages) -> str:
    """Return the raw question: the text itself, or the user's last message."""
    if isinstance(prompt, str):
        return prompt
    questions = [message["content"] for message in prompt if message["role"] == "user"]
    return questions[-1] if questions else ""


def kind_of(value: object) -> str:
    """Return what a value is, for messages."""
    return f"an object with keys {sorted(value)}" if isinstance(value, Mapping) else f"a {type(value).__name__}"
