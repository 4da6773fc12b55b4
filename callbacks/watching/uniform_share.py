"""What a uniform choice would have given, from the rollouts that were chosen uniformly."""

from __future__ import annotations

import math
from collections.abc import Sequence


class UniformShare:
    """The share of informative groups among uniformly drawn prompts, of late.

    A step that has none leaves the share as it is; older steps count for less and less, because the policy changes:
    each weighs 0.9 of the one after it, so that about ten steps count.
    """

    DECAY = 0.9

    def __init__(self) -> None:
        self._informative = 0.0
        self._groups = 0.0

    @property
    def share(self) -> float:
        """In [0, 1]; NaN before any uniform rollout."""
        return self._informative / self._groups if self._groups else math.nan

    def step(self, informative: Sequence[bool]) -> None:
        """Takes in a step: whether each of its uniformly drawn groups was informative."""
        self._informative = self.DECAY * self._informative + sum(informative)
        self._groups = self.DECAY * self._groups + len(informative)

    def state_dict(self) -> dict[str, float]:
        return {"informative": self._informative, "groups": self._groups}

    def load_state_dict(self, state: dict[str, float]) -> None:
        self._informative, self._groups = state["informative"], state["groups"]
