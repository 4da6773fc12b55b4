"""Messages between the trainer and its reward workers: pickles towards the worker, JSON back to the trainer."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np

from app.rewards.base import Column, Scores, Texts

COMMAND = struct.Struct("!cq")
"""A command to the fork server: `F` and 0 with a socket attached (fork), or `K` and a process id (kill)."""

FailureKind = Literal["timed_out", "crashed"]
Loggable = str | int | float | bool | None


@dataclass(frozen=True)
class TrainerState:
    """The part of the run's state that reward functions receive, named as in transformers' `TrainerState`."""

    global_step: int = 0
    max_steps: int = -1
    epoch: float = 0.0
    num_train_epochs: int = 1
    num_input_tokens_seen: int = 0
    is_local_process_zero: bool = True
    is_world_process_zero: bool = True


@dataclass(frozen=True)
class Setup:
    """First message to a worker: its rewards, pickled one by one so that one that fails to load can be named."""

    rewards: tuple[bytes, ...]
    memory_limit_mb: int


@dataclass(frozen=True)
class Reply:
    """A message from a worker.

    Attributes:
        kind: "started" (with `pid`), "loading" (with `reward`, a position), "ready" and "scores" in the normal course;
            "unusable" (the configuration or data is wrong), "unloadable" and "raised" after an exception.
        scores: `N` scores, None where the reward does not apply or the value was invalid.
        invalid: what is wrong with a returned score, by position (as text: JSON has no other keys).
        metrics: (name, value) pairs that the function logged.
        extras: `N` values by column name that the function logged.
        error: one line.
    """

    kind: Literal["started", "loading", "ready", "scores", "unusable", "unloadable", "raised"]
    pid: int = 0
    reward: int = 0
    scores: Scores = field(default_factory=list)
    invalid: dict[str, str] = field(default_factory=dict)
    metrics: list[tuple[str, float]] = field(default_factory=list)
    extras: dict[str, list[Loggable]] = field(default_factory=dict)
    error: str = ""
    traceback: str = ""

    def encode(self) -> bytes:
        return json.dumps(vars(self)).encode()

    @classmethod
    def decode(cls, message: bytes) -> Reply:
        return cls(**json.loads(message))


@dataclass(frozen=True)
class Call:
    """A request to compute one reward for some completions.

    Attributes:
        reward: position among the rewards of the pool.
        prompts: `N` rendered prompts or message lists.
        completions: `N` texts or message lists.
        completion_ids: `N` int32 arrays `[T]`.
        columns: `N` values by column name.
        state: passed on to functions.
        labels: `N` names for log messages, e.g. "prompt 'a1', completion 3".
        seed: seed of Python's and NumPy's global generators while the reward runs.
    """

    reward: int
    prompts: Texts
    completions: Texts
    completion_ids: Sequence[np.ndarray]
    columns: Mapping[str, Column]
    state: TrainerState
    labels: Sequence[str]
    seed: int = 0

    def __len__(self) -> int:
        return len(self.completions)

    def only(self, item: int) -> Call:
        """Return the same call for one of its completions."""
        one = slice(item, item + 1)
        return replace(
            self,
            prompts=self.prompts[one],
            completions=self.completions[one],
            completion_ids=self.completion_ids[one],
            columns={name: values[one] for name, values in self.columns.items()},
            labels=self.labels[one],
        )


@dataclass
class CallResult:
    """Result of a call for `N` completions.

    Attributes:
        scores: `N` scores; None where the reward does not apply or failed.
        failures: kind of failure by position.
        metrics: (name, value, weight) as the function logged them; the weights of a name sum to the completions.
        extras: as in `Reply`.
    """

    scores: Scores
    failures: dict[int, FailureKind] = field(default_factory=dict)
    metrics: list[tuple[str, float, float]] = field(default_factory=list)
    extras: dict[str, list[Loggable]] = field(default_factory=dict)

    @classmethod
    def joined(cls, parts: Sequence[CallResult]) -> CallResult:
        """Concatenate the results of successive calls."""
        whole = cls(scores=[])
        for part in parts:
            start = len(whole.scores)
            whole.scores += part.scores
            whole.failures |= {start + item: kind for item, kind in part.failures.items()}
            whole.metrics += part.metrics
            for name in [*whole.extras, *(name for name in part.extras if name not in whole.extras)]:
                column = whole.extras.setdefault(name, [None] * start)
                column += part.extras.get(name, [None] * len(part.scores))
        return whole
