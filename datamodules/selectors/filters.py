"""The interface of filters: rules that keep prompts out of a choice, whatever ranks them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import numpy as np

from datamodules.pool import PromptPool
from datamodules.selectors.base import SelectionContext
from datamodules.types import Outcomes


class Filter(ABC):
    """Says at every choice which prompts may be taken; `Composed` asks it, and tells it what the rollouts showed."""

    def setup(self, pool: PromptPool, context: SelectionContext) -> None:
        """Called once, before the first choice."""

    def begin_step(self) -> None:
        """Called once for every training step, before its first choice."""

    @abstractmethod
    def admits(self, rng: np.random.Generator) -> np.ndarray:
        """bool `[Q]`: which prompts may be taken in this choice. Must not change the state."""

    def learn(self, positions: np.ndarray, outcomes: Outcomes) -> None:
        """As `Selector.learn`."""

    def refill_size(self, missing: int, default: int, kept_fraction: float) -> int | None:
        """As `Selector.refill_size`; None leaves it to the ranker."""
        return None

    def metrics(self) -> dict[str, float]:
        """As `Selector.metrics`."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """As `Selector.state_dict`."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores `state_dict`."""
