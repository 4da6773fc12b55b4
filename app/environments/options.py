"""The options of an environment: what it is, and the limits of its processes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Literal

from app.environments.base import Environment
from datamodules.errors import UserError


@dataclass(frozen=True)
class Plain:
    """Tool calls in plain strings, for policies without a chat template that shows tools.

    Args:
        start: what a call starts with, e.g. `<calc>`.
        end: what a call ends with, e.g. `</calc>`; the policy's turn ends there.
        tool: the tool that is called.
        argument: its argument, which gets the text in between, without spaces around it.
        reply: what follows the policy's tokens, with `{content}` for what the tool returned.

    Raises:
        UserError: a string is empty, or `reply` leaves out the content.
    """

    start: str
    end: str
    tool: str
    argument: str
    reply: str = "{content}"

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not value:
                raise UserError(f"model.environment.protocol.{name} is empty. Give it a text.")
        if "{content}" not in self.reply:
            raise UserError(
                f"model.environment.protocol.reply is {self.reply!r}, so the policy would not read what the tool "
                "returned. Write {content} where it goes."
            )


class EnvironmentOptions(ABC):
    """Describes an environment in the trainer's process, and makes it in processes of its own.

    Each live conversation has a process, which is forked from one that has imported the environment's code, and serves
    further conversations afterwards. Objects pickle.

    Args:
        max_turns: turns that the policy gets in one conversation.
        protocol: how the policy writes tool calls: "hermes" (`<tool_call>` as Qwen and Hermes do, with JSON or XML in
            it), "llama" (JSON as Llama 3.1 does), "auto" (the one that the chat template shows), or plain strings.
        time_limit_s: seconds that a reset, an answer to a turn, or a reward may take.
        memory_limit_mb: address space that a process may take for itself, in MiB, on top of what importing the code
            has taken.
        max_reply_characters: characters of one message to the policy; a longer one is cut, and says so.
        max_sessions: processes, that is, conversations at the same time; others wait.
        load_limit_s: seconds that importing the code may take, and building an environment.

    Raises:
        UserError: a limit is not above 0.
    """

    names: tuple[str, ...] = ("",)
    """Names of the environments among which a row's column `environment` chooses; one empty name for a single one."""

    def __init__(
        self,
        max_turns: int = 8,
        protocol: Literal["auto", "hermes", "llama"] | Plain = "auto",
        time_limit_s: float = 10.0,
        memory_limit_mb: int = 2048,
        max_reply_characters: int = 4096,
        max_sessions: int = 256,
        load_limit_s: float = 60.0,
    ) -> None:
        self.max_turns, self.protocol = max_turns, protocol
        self.time_limit_s, self.memory_limit_mb = time_limit_s, memory_limit_mb
        self.max_reply_characters, self.max_sessions = max_reply_characters, max_sessions
        self.load_limit_s = load_limit_s
        for name, value in vars(self).items():
            if isinstance(value, int | float) and not value > 0:
                raise UserError(f"model.environment.{name} is {value}, but must be above 0. Raise it or leave it out.")

    @property
    @abstractmethod
    def preload(self) -> tuple[str, ...]:
        """Modules, or files of Python code, that are imported once, before processes are forked.

        They must bear being forked: no threads, no CUDA. An error in one is reported by the process that needs it.
        """

    @abstractmethod
    def load(self) -> None:
        """Import what environments need. Called once per process. Raises UserError where the configuration is wrong."""

    @abstractmethod
    def make(self, name: str) -> Environment:
        """Build an environment, in its process.

        Args:
            name: one of `names`.
        """
