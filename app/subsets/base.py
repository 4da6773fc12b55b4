"""The interface of an offline selection method."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.figure import Figure

from app.module import GRPOModule
from app.subsets.bench import Bench
from datamodules.types import Prompt

Measured = Mapping[str, np.ndarray]
"""Arrays whose first axis is the prompt, by name."""


@dataclass(frozen=True, slots=True)
class Column:
    """What is kept of every prompt under one name.

    Attributes:
        dtype: numpy's name of the type.
        width: numbers per prompt; 0 for a single one.
    """

    dtype: str
    width: int = 0

    def shape(self, prompts: int) -> tuple[int, ...]:
        return (prompts, self.width) if self.width else (prompts,)


class OfflineMethod(ABC):
    """Measures every prompt once, in any number of sittings, and scores the pool from the measurements.

    Attributes:
        warmup_steps: batches of plain GRPO that the policy is trained on before anything is measured.
    """

    warmup_steps: int = 0

    def check(self, module: GRPOModule) -> None:
        """Called before anything is computed. Raises UserError for settings that do not suit the module."""

    @abstractmethod
    def prepare(self, bench: Bench) -> dict[str, Column]:
        """Called once, before `measure`; names what will be kept of every prompt."""

    @abstractmethod
    def measure(self, bench: Bench, prompts: Sequence[Prompt]) -> dict[str, np.ndarray]:
        """The columns of some prompts, `[B]` or `[B, width]` each; depends on the policy and the prompts alone."""

    @abstractmethod
    def score(self, measured: Measured) -> np.ndarray:
        """float64 `[Q]`: the higher, the sooner a prompt is kept; -inf where nothing could be measured."""

    @abstractmethod
    def draw(self, measured: Measured, score: np.ndarray, kept: np.ndarray) -> Figure:
        """A picture of the selection; `kept` bool `[Q]`."""


def best(score: np.ndarray, keep: int) -> np.ndarray:
    """int64 `[keep]`: positions of the highest scores, the highest first; of equal ones the earlier in the pool."""
    return np.argsort(-score, kind="stable")[:keep]
