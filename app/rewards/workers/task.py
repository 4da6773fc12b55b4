"""Messages between the trainer and its reward workers: pickles towards the worker, JSON back to the trainer."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np

from app.rewards.base import Column, Scores, Texts
from app.rewards.workers.frames import GarbledError

COMMAND = struct.Struct("!cq")
"""A command to the fork server: `F` and 0 with a socket attached (fork), or `K` and a process id (kill)."""

MAX_SCORE = 1e6
"""Largest magnitude of a score. Sums and squares of a batch stay far within the range of float32, whose 24 bits still
resolve 1/16 at this size."""
MAX_METRIC = 3e38
"""Largest magnitude of a value given to `log_metric`, which loggers store as float32."""
MAX_REPLY_BYTES = 16 * 2**20
"""Keeps what a function logs from filling the trainer's memory; the scores of a chunk take a few hundred bytes."""
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
    num_workers: int


@dataclass(frozen=True)
class Reply:
    """A message from a worker.

    Attributes:
        kind: "started" (with `pid`), "loading" (with `reward`, a position), "ready", "scores" and "partial" in the
            normal course; "unusable" (the configuration or data is wrong), "unloadable" and "raised" after an
            exception.
        row: position in the call of the first score. A call that is scored one by one is answered by one message per
            completion, any other by one with all scores. "partial" holds what a generator has just yielded.
        scores: a number, or None where the reward does not apply or the value was invalid, per completion.
        invalid: what is wrong with a returned score, by position (as text: JSON has no other keys).
        late: positions of those that took too long.
        metrics: (name, value) pairs that the function logged.
        extras: values by column name that the function logged, one per score.
        notes: what is wrong with what the function logged; with "ready", what the rewards say (`Reward.start_notice`).
        error: one line.
    """

    kind: Literal["started", "loading", "ready", "scores", "partial", "unusable", "unloadable", "raised"]
    pid: int = 0
    reward: int = 0
    row: int = 0
    scores: Scores = field(default_factory=list)
    invalid: dict[str, str] = field(default_factory=dict)
    late: list[int] = field(default_factory=list)
    metrics: list[tuple[str, float]] = field(default_factory=list)
    extras: dict[str, list[Loggable]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    error: str = ""
    traceback: str = ""

    def encode(self) -> bytes:
        return json.dumps(vars(self)).encode()

    @classmethod
    def decode(cls, message: bytes) -> Reply:
        """Restore a reply. Raises GarbledError for anything that no worker of ours sends."""
        try:
            reply = cls(**json.loads(message))
            scores = [None if score is None else float(score) for score in reply.scores]
            metrics = [(str(name), float(value)) for name, value in reply.metrics]
            well_formed = (
                isinstance(reply.pid, int)
                and isinstance(reply.row, int)
                and all(score is None or abs(score) <= MAX_SCORE for score in scores)
                and all(abs(value) <= MAX_METRIC for _, value in metrics)
                and all(len(values) == len(scores) for values in reply.extras.values())
                and all(0 <= int(position) < len(scores) for position in reply.invalid)
                and all(str(position) in reply.invalid for position in reply.late)
            )
        except (ValueError, TypeError, AttributeError, OverflowError, RecursionError) as error:
            raise GarbledError from error
        if not well_formed:
            raise GarbledError
        return replace(reply, scores=scores, metrics=metrics)

    @property
    def failures(self) -> dict[int, Failure]:
        """Why scores are missing, by position."""
        late = set(self.late)
        return {
            (position := int(key)): Failure("timed_out" if position in late else "crashed", error)
            for key, error in self.invalid.items()
        }


@dataclass(frozen=True)
class Call:
    """A request to compute one reward for some completions.

    Attributes:
        reward: position among the rewards of the pool.
        prompts: `N` rendered prompts or message lists.
        completions: `N` texts or message lists; of a conversation with an environment its last turn's text, or all
            its messages.
        completion_ids: `N` int32 arrays `[T]`.
        columns: `N` values by column name.
        state: passed on to functions.
        labels: `N` names for log messages, e.g. "prompt 'a1', completion 3".
        seed: seed of Python's and NumPy's global generators while the reward runs.
        environments: `N` final environment objects, pickled, None for one that does not pickle; None in a run without
            an environment.
        one_by_one: call the reward with one completion at a time and answer each.
        trial: refuse a reward whose signature, columns or returned values are wrong, and do not score again.
    """

    reward: int
    prompts: Texts
    completions: Texts
    completion_ids: Sequence[np.ndarray]
    columns: Mapping[str, Column]
    state: TrainerState
    labels: Sequence[str]
    seed: int
    environments: Sequence[bytes | None] | None = None
    one_by_one: bool = False
    trial: bool = False

    def __len__(self) -> int:
        return len(self.completions)

    def rows(self, first: int, last: int) -> Call:
        """Return the same call for its completions `first` to `last - 1`."""
        some = slice(first, last)
        return replace(
            self,
            prompts=self.prompts[some],
            completions=self.completions[some],
            completion_ids=self.completion_ids[some],
            columns={name: values[some] for name, values in self.columns.items()},
            labels=self.labels[some],
            environments=None if self.environments is None else self.environments[some],
        )


@dataclass(frozen=True)
class Failure:
    """Why a completion has no score."""

    kind: FailureKind
    error: str
    traceback: str = ""


@dataclass
class CallResult:
    """Result of a call for `N` completions.

    Attributes:
        scores: `N` scores; None where the reward does not apply or failed.
        failures: failures by position.
        metrics: (name, value, weight) as the function logged them; the weights of a name sum to the completions.
        extras: as in `Reply`.
        notes: as in `Reply`.
        overran: completions of calls that passed the time limit and were scored again one by one.
    """

    scores: Scores
    failures: dict[int, Failure] = field(default_factory=dict)
    metrics: list[tuple[str, float, float]] = field(default_factory=list)
    extras: dict[str, list[Loggable]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    overran: int = 0

    @classmethod
    def joined(cls, parts: Sequence[CallResult]) -> CallResult:
        """Concatenate the results of successive calls."""
        whole = cls(scores=[])
        for part in parts:
            start = len(whole.scores)
            whole.scores += part.scores
            whole.failures |= {start + item: failure for item, failure in part.failures.items()}
            whole.metrics += part.metrics
            whole.notes += part.notes
            whole.overran += part.overran
            for name in [*whole.extras, *(name for name in part.extras if name not in whole.extras)]:
                column = whole.extras.setdefault(name, [None] * start)
                column += part.extras.get(name, [None] * len(part.scores))
        return whole

    def spread(self, rows: np.ndarray, count: int) -> CallResult:
        """Return the same result as that of a call for `count` completions, of which these are the `rows`."""
        if len(rows) == count:
            return self

        def placed(values: Sequence[Loggable]) -> list[Loggable]:
            whole: list[Loggable] = [None] * count
            for row, value in zip(rows.tolist(), values, strict=True):
                whole[row] = value
            return whole

        scores: Scores = [None] * count
        for row, score in zip(rows.tolist(), self.scores, strict=True):
            scores[row] = score
        failures = {int(rows[item]): failure for item, failure in self.failures.items()}
        extras = {name: placed(values) for name, values in self.extras.items()}
        return replace(self, scores=scores, failures=failures, extras=extras)
