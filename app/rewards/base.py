"""Base class of rewards. Its call signature is that of TRL's reward functions."""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar, Self, TypeAlias

from datamodules.types import Messages

Texts: TypeAlias = Sequence[str | Messages]
"""`N` texts, or `N` message lists for conversational data."""
TokenIds: TypeAlias = Sequence[list[int]]
Column: TypeAlias = Any
"""`N` values of whatever type the data has, or one of the extra arguments that TRL passes to functions."""
Scores: TypeAlias = list[float | None]
EXTRACTED_ANSWER = "extracted_answer"
"""Column of `log_extra` that holds the answers that a reward finds in the completions: the votes of maj@k."""


class ScoreError(Exception):
    """Why there is no score, in one line. It may be returned in place of a score, so that only this completion fails.

    Raised, it fails the whole call like any exception, and its completions are scored again one by one.

    Args:
        reason: what happened.
        timed_out: whether it took too long.
        refused: whether it would happen to any completion, so that it ends a run whose trial meets it.
    """

    def __init__(self, reason: str, timed_out: bool = False, refused: bool = False) -> None:
        super().__init__(reason)
        self.timed_out, self.refused = timed_out, refused


class Reward(ABC):
    """Scores completions. It runs in a worker process that is killed when it takes too long, so it must pickle.

    Args:
        weight: factor of this reward in the optimised sum.
        correctness: whether this reward measures correctness, to which difficulty, filters and accuracy refer. If no
            reward of a run is marked true, every reward does that is not marked false, and if that leaves none, the
            first. A completion's correctness is the score of the first of them, in list order, that applies to it.
        name: name in logged metrics (`rewards/<name>/mean`); by default the class name in lower case.
    """

    preload: ClassVar[tuple[str, ...]] = ()
    """Slow, fork-safe modules that `load` needs. They are imported once, before the workers are forked."""
    one_by_one: ClassVar[bool] = False
    """Whether a worker calls the reward with one completion at a time, under the time limit for each, so that a failure
    costs no other score. For rewards whose scores depend on nothing but their own row."""
    seconds_per_score: float = 0.0
    """Seconds that one score may take by the reward's own limits, for which the workers' time limit must leave room."""
    sharing_workers: int = 1
    """Worker processes of this rank. Set before `load`."""
    start_notice: str = ""
    """A sentence that is said once at the start of a run. `load` may set it."""

    def __new__(cls, *args: object, **kwargs: object) -> Self:
        """Set the defaults, so that a subclass whose `__init__` does not call this class's has them."""
        made = super().__new__(cls)
        made.weight, made.correctness, made.name = 1.0, None, cls.__name__.lower()
        return made

    def __init__(self, weight: float = 1.0, correctness: bool | None = None, name: str | None = None) -> None:
        self.weight = weight
        self.correctness = correctness
        self.name = name or type(self).__name__.lower()

    def load(self) -> None:
        """Import what scoring needs. Called once per worker before its first score, outside the time limit."""

    @property
    def receiver(self) -> Callable[..., object]:
        """What is called with the columns of the data in the end, for messages about its signature. Loads nothing."""
        return self.__call__

    @property
    def takes_environments(self) -> bool:
        """Whether it names the argument `environments`, or may do so where that shows only once it is loaded."""
        return "environments" in inspect.signature(self.receiver).parameters

    @abstractmethod
    def __call__(
        self, /, prompts: Texts, completions: Texts, completion_ids: TokenIds, **columns: Column
    ) -> Scores | Iterator[float | ScoreError | None]:
        """Return one score per completion; None where this reward does not apply.

        A score is at most 1e6 in magnitude (`workers.task.MAX_SCORE`).

        Args:
            prompts: `N` rendered prompts, or message lists for conversational data.
            completions: `N` texts, or `[{"role": "assistant", "content": text}]` for conversational data. Of a
                conversation with an environment these are the text of the policy's last turn, or all its messages.
            completion_ids: `N` lists of token ids, those of an environment included.
            columns: every other column of the data, `N` values each. A reward that names the argument `environments`
                is given the `N` final objects of the environment.
        """
