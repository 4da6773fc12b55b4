"""Conversations that an engine generates the policy's turns of, while an environment answers others."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

from datamodules.types import Completion, Prompt


@dataclass(frozen=True, slots=True, eq=False)
class TurnRequest:
    """A turn that the policy is to generate.

    Attributes:
        conversation: number of the conversation, `0 <= conversation < len(conversations)`.
        prompt: the conversation's prompt; its `token_ids` are all tokens so far, which the policy has generated or read
            before, followed by those that the environment has added.
        seed: of the turn.
        limit: maximum number of its tokens.
    """

    conversation: int
    prompt: Prompt
    seed: int
    limit: int


class Conversations(ABC):
    """The environment's side of conversations, as an engine sees it.

    An engine calls `begin`, generates the turns that it gets and reports each by `ended`, and asks for more by `next`
    until none are left. In one process the same calls give the same turns, so that an engine which waits (`next` with
    `wait`) at moments that depend on nothing but the turns generates the same batches again.
    """

    waited: float = 0.0
    """Seconds in which the engine had nothing to generate, or left it until the environment had answered. `begin` and
    `next` add those that they wait; an engine that waits by itself adds its own."""

    @property
    @abstractmethod
    def longest(self) -> int:
        """Maximum number of tokens of a conversation, its prompt included, by what is known so far.

        One that has yet to begin may have a longer prompt, because its environment adds to it.
        """

    @abstractmethod
    def __len__(self) -> int:
        """Return the number of conversations."""

    @abstractmethod
    def begin(self) -> list[TurnRequest]:
        """Return the first turns of the conversations that begin at once; others begin by `next`."""

    @abstractmethod
    def ended(self, conversation: int, turn: Completion) -> None:
        """Take a turn that the policy has generated. Does not wait for the environment's answer."""

    @property
    @abstractmethod
    def outstanding(self) -> int:
        """Number of conversations that wait for the environment."""

    @abstractmethod
    def next(self, wait: bool = True) -> list[TurnRequest]:
        """Return the turns that can begin since the last call, by conversation.

        Args:
            wait: wait for all outstanding answers; False takes those that are there.
        """
