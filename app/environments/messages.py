"""Messages between the trainer and its environments: pickles towards a process, JSON back to the trainer."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from app.environments.base import Reply, ToolCall
from app.environments.options import EnvironmentOptions
from app.rewards.workers.frames import GarbledError
from app.rewards.workers.task import MAX_SCORE

MAX_ANSWER_BYTES = 16 * 2**20
MAX_OUTPUT_BYTES = 2**20
"""What a process may print while it lives, and all that it has started; the rest is left out."""
MAX_PICKLE_BYTES = 8 * 2**20
"""Largest final object, pickled, that is handed to reward functions."""


@dataclass(frozen=True)
class Setup:
    """First message to a process."""

    options: EnvironmentOptions


@dataclass(frozen=True)
class Describe:
    """Ask for the schemas of all tools, and which environments score themselves."""


@dataclass(frozen=True)
class Open:
    """Begin a conversation."""

    columns: Mapping[str, Any]
    seed: int


@dataclass(frozen=True)
class Respond:
    """Ask for the answer to a turn of the policy; see `Sessions.respond`."""

    text: str
    calls: list[ToolCall]
    malformed: list[str]


@dataclass(frozen=True)
class Finish:
    """Ask for the reward and the final object."""


Request = Describe | Open | Respond | Finish


@dataclass(frozen=True)
class Answer:
    """A message from a process.

    Attributes:
        kind: "started" (with `pid`), "ready" and "unloadable" before the first request; "building" and "built" around
            the construction of an environment; "described", "opened", "replied" and "finished" answer a request, and
            so does "failed".
        error: one line, with "failed" and "unloadable".
        observation: with "opened".
        reply: with "replied".
        reward: with "finished".
        schemas: with "described", by name of the environment.
        unscored: with "described", names of the environments that never have a reward of their own.
        pickled: the final object, with "finished"; not part of the JSON.
    """

    kind: Literal[
        "started", "ready", "unloadable", "building", "built", "described", "opened", "replied", "finished", "failed"
    ]
    pid: int = 0
    error: str = ""
    observation: str | None = None
    reply: Reply | None = None
    reward: float | None = None
    schemas: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    unscored: list[str] = field(default_factory=list)
    pickled: bytes | None = None

    def encode(self) -> bytes:
        content = {**vars(self), "reply": None if self.reply is None else asdict(self.reply)}
        pickled = content.pop("pickled")
        return json.dumps(content).encode() + b"\n" + (b"" if pickled is None else pickled)

    @classmethod
    def decode(cls, message: bytes) -> Answer:
        """Restore an answer. Raises GarbledError for anything that no process of ours sends."""
        text, _, pickled = message.partition(b"\n")
        try:
            # An environment's text may hold lone surrogates, which no tokenizer accepts.
            content = json.loads(text.decode(), object_pairs_hook=_clean)
            reply = None if content["reply"] is None else Reply(**content.pop("reply"))
            answer = cls(**{**content, "reply": reply, "pickled": pickled or None})
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise GarbledError from error
        if not answer._well_formed():
            raise GarbledError
        return answer

    def _well_formed(self) -> bool:
        reward, reply = self.reward, self.reply
        return (
            isinstance(self.kind, str)
            and isinstance(self.pid, int)
            and isinstance(self.error, str)
            and (self.observation is None or isinstance(self.observation, str))
            and (reward is None or (isinstance(reward, int | float) and abs(reward) <= MAX_SCORE))
            and isinstance(self.schemas, dict)
            and isinstance(self.unscored, list)
            and (
                reply is None
                or (
                    isinstance(reply.messages, list)
                    and all(
                        isinstance(message, dict)
                        and isinstance(message.get("role"), str)
                        and isinstance(message.get("content"), str)
                        for message in reply.messages
                    )
                    and isinstance(reply.done, bool)
                    and isinstance(reply.calls, int)
                    and isinstance(reply.failed_calls, int)
                )
            )
        )


def _clean(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    return {
        name: value.encode("utf-8", "replace").decode() if isinstance(value, str) else value for name, value in pairs
    }
