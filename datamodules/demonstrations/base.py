"""What a worked solution is, and how a habit of slipping is put into it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

ANSWER_MARKER = "#### "
"""Stands before the final answer (GSM8K's convention); a reward reads what follows it."""

SLIPS = (-10, -2, -1, 1, 2, 10)
"""How far a wrong number is off: a miscount, or a forgotten carry."""


@dataclass(frozen=True, slots=True)
class Solution:
    """A worked solution.

    Attributes:
        work: the steps as text; each writes the operands that it works on.
        answer: what the last step arrived at.
        slips: steps that were done wrong. Those after a slip go on from the wrong value.
    """

    work: str
    answer: str
    slips: int

    @property
    def text(self) -> str:
        """The completion as the policy shall write it, without the end token."""
        return f"{self.work}{ANSWER_MARKER}{self.answer}"


class Demonstrator(Protocol):
    """Solves the entries of one reasoning-gym task, step by step."""

    task: str

    def solve(self, metadata: Mapping[str, Any], noise: float, rng: np.random.Generator) -> Solution:
        """The solution of an entry, every step of which is independently wrong with probability `noise`.

        Args:
            metadata: `entry["metadata"]` as reasoning-gym made it.
            noise: in [0, 1]; 0 always gives the right answer.
            rng: the only source of chance.
        """
        ...


def slipped(value: int, rng: np.random.Generator) -> int:
    """A wrong value near `value`, uniform over `SLIPS`."""
    return value + SLIPS[int(rng.integers(len(SLIPS)))]
