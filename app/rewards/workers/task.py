"""What travels between the trainer and its reward workers: pickles on the way there, JSON on the way back."""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np

from datamodules.types import Messages

ORDER = struct.Struct("!cq")
"""An order to the nursery: `F` and 0 with a socket attached (fork), or `K` and a process id (kill)."""

FailureKind = Literal["timed_out", "crashed"]


@dataclass(frozen=True)
class TrainerState:
    """What a reward function may know about the run; the names are those of transformers' `TrainerState`."""

    global_step: int = 0
    max_steps: int = -1
    epoch: float = 0.0
    num_train_epochs: int = 1
    num_input_tokens_seen: int = 0
    is_local_process_zero: bool = True
    is_world_process_zero: bool = True


@dataclass(frozen=True)
class Setup:
    """The first message to a worker: its rewards, each pickled by itself so that one that fails can be named."""

    rewards: tuple[bytes, ...]
    memory_limit_mb: int


@dataclass(frozen=True)
class Call:
    """One reward to be computed for some completions.

    Attributes:
        reward: position among the rewards of the pool.
        prompts: `N` rendered prompts or message lists.
        completions: `N` texts or message lists.
        completion_ids: `N` int32 arrays `[T]`.
        columns: `N` values by column name.
        state: passed on to functions.
        labels: `N` names for the log, e.g. "prompt 'a1', completion 3".
        seed: of Python's and NumPy's global generators while the reward runs.
    """

    reward: int
    prompts: Sequence[str | Messages]
    completions: Sequence[str | Messages]
    completion_ids: Sequence[np.ndarray]
    columns: Mapping[str, Sequence[Any]]
    state: TrainerState
    labels: Sequence[str]
    seed: int = 0

    def __len__(self) -> int:
        return len(self.completions)

    def only(self, item: int) -> Call:
        """The same call for one of its completions."""
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
    """What came of a call of `N` completions.

    Attributes:
        scores: `N` of them; None where the reward does not apply or failed.
        failures: kind by position.
        metrics: (name, value, weight) as logged by the function; the weights of a name add up to the completions.
        extras: `N` values by column name, as logged by the function.
    """

    scores: list[float | None]
    failures: dict[int, FailureKind] = field(default_factory=dict)
    metrics: list[tuple[str, float, float]] = field(default_factory=list)
    extras: dict[str, list[Any]] = field(default_factory=dict)

    @classmethod
    def joined(cls, parts: Sequence[CallResult]) -> CallResult:
        """The results of successive calls as one."""
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
