"""The interface of environments, as their processes see them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from datamodules.types import Messages


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A call that the policy wrote: the name of a tool and its arguments."""

    name: str
    arguments: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Reply:
    """What an environment answers to a turn of the policy.

    Attributes:
        messages: for the policy, in order; empty if the conversation is over.
        done: the policy gets no further turn, whatever the messages are.
        calls: tool calls that it executed.
        failed_calls: those that raised, or named no tool.
    """

    messages: Messages
    done: bool = False
    calls: int = 0
    failed_calls: int = 0


class Environment(ABC):
    """An environment of one conversation at a time. It runs in a process of its own, which is killed when it hangs."""

    @abstractmethod
    def tools(self) -> list[dict[str, Any]]:
        """Return the JSON schemas of its tools, as chat templates take them."""

    @abstractmethod
    def reset(self, columns: Mapping[str, Any]) -> str | None:
        """Begin a conversation.

        Args:
            columns: the row of the data: `prompt` and all its other columns.

        Returns:
            Text that is added to the prompt's last user message; None for none.
        """

    @abstractmethod
    def respond(self, text: str, calls: list[ToolCall]) -> Reply:
        """Answer a turn of the policy.

        Args:
            text: what the policy said, without the markup of its calls.
            calls: the tool calls in it.
        """

    @property
    def scores_itself(self) -> bool:
        """Whether `reward` may return a score; False if it is known that it never does."""
        return type(self).reward is not Environment.reward

    def reward(self) -> float | None:
        """Return its own reward for the conversation so far; None if it has none."""
        return None

    def final(self) -> object:
        """Return what reward functions get as one of their `environments`."""
        return self
