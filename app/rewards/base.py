"""The interface of every reward: the signature that TRL's reward functions have."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

from datamodules.types import Messages


class Reward(ABC):
    """Scores completions. Runs in a worker process that is killed when it takes too long, so it needs to pickle.

    Args:
        weight: factor of this reward in the sum that is optimised.
        correctness: whether this is the reward that difficulty, filters and accuracy are about. Exactly one of a
            run's rewards is; when none is marked, the first.
        name: under which it is logged (`rewards/<name>/mean`); the class's name in lower case by default.
    """

    preload: ClassVar[tuple[str, ...]] = ()
    """Slow modules that `load` needs and that stand a fork: imported once, before the workers are forked."""

    def __init__(self, weight: float = 1.0, correctness: bool = False, name: str | None = None) -> None:
        self.weight = weight
        self.correctness = correctness
        self.name = name or type(self).__name__.lower()

    def load(self) -> None:
        """Called once in every worker before its first score, outside the time limit of a score: import here."""

    @abstractmethod
    def __call__(
        self,
        prompts: Sequence[str | Messages],
        completions: Sequence[str | Messages],
        completion_ids: Sequence[list[int]],
        **columns: Any,
    ) -> list[float | None]:
        """One score per completion; None where this reward does not apply.

        Args:
            prompts: `N` rendered prompts, or message lists for conversational data.
            completions: `N` texts, or `[{"role": "assistant", "content": text}]` for conversational data.
            completion_ids: `N` lists of token ids.
            columns: every other column of the data, `N` values each.
        """
