"""The interface of an offline selection method."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from app.module import GRPOModule
from app.subsets.frozen_policy import FrozenPolicy
from datamodules.types import Prompt

Measured = Mapping[str, np.ndarray]
"""Arrays whose first axis is the prompt, by name."""


@dataclass(frozen=True, slots=True)
class Column:
    """The type of one measurement of every prompt."""

    dtype: str
    width: int = 0  # numbers per prompt; 0 for a scalar

    def shape(self, prompts: int) -> tuple[int, ...]:
        """Return the shape of the column for a number of prompts."""
        return (prompts, self.width) if self.width else (prompts,)


class OfflineMethod(ABC):
    """Measures every prompt once, over any number of sessions, and scores the pool from the measurements."""

    warmup_steps: int = 0  # batches of plain GRPO that the policy is trained on before the measurements
    options: Any  # a dataclass

    def check(self, module: GRPOModule) -> None:
        """Raise UserError for settings that do not suit the module. Called before anything is computed."""

    @abstractmethod
    def prepare(self, policy: FrozenPolicy) -> dict[str, Column]:
        """Return the columns that `measure` fills. Called once, before it."""

    @abstractmethod
    def measure(self, policy: FrozenPolicy, prompts: Sequence[Prompt]) -> dict[str, np.ndarray]:
        """Return the columns of some prompts, `[B]` or `[B, width]`; they depend on policy and prompts alone."""

    @abstractmethod
    def score(self, measured: Measured) -> np.ndarray:
        """Return float64 `[Q]`: prompts with the highest scores are kept; -inf if nothing could be measured."""

    @abstractmethod
    def draw(self, measured: Measured, score: np.ndarray, kept: np.ndarray) -> Figure:
        """Draw the selection; `kept` is bool `[Q]`."""


def best(score: np.ndarray, keep: int) -> np.ndarray:
    """Return the positions of the highest scores, int64 `[keep]`, in descending order; ties in the pool's order."""
    return np.argsort(-score, kind="stable")[:keep]
