"""The interface of every selection method."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from datamodules.errors import UserError
from datamodules.pool import PromptPool
from datamodules.seeding import generator
from datamodules.types import Outcomes


@dataclass(frozen=True, slots=True)
class SelectionContext:
    """What a selector may need beside the pool.

    Attributes:
        seed: the run's seed.
        policy_path: folder or hub name of the policy's initial weights: the default text encoder.
        cache_dir: where embeddings are kept between runs.
    """

    seed: int
    policy_path: str | None = None
    cache_dir: Path = Path("~/.cache/dots")


class Selector(ABC):
    """Decides which prompts are rolled out next, from what earlier rollouts showed.

    Subclasses implement `select` and, where they learn, `learn`, `forecast` and their state, all vectorised over the
    pool and in pool positions. Every random draw comes from `self.draw_generator()`, which depends on the run's seed
    and a counter that is part of the state: a restored selector continues with identical choices.

    Class attributes:
        uses_references: whether reference rollouts teach it anything.
    """

    uses_references = False

    def __init__(self) -> None:
        self._pool: PromptPool | None = None
        self._context: SelectionContext | None = None
        self._draws = 0

    @property
    def pool(self) -> PromptPool:
        if self._pool is None:
            raise RuntimeError(f"{type(self).__name__} is used before setup()")
        return self._pool

    @property
    def context(self) -> SelectionContext:
        if self._context is None:
            raise RuntimeError(f"{type(self).__name__} is used before setup()")
        return self._context

    @property
    def is_ready(self) -> bool:
        """Whether `setup` has been called."""
        return self._pool is not None

    def setup(self, pool: PromptPool, context: SelectionContext) -> None:
        """Called once, before the first choice."""
        self._pool, self._context = pool, context

    def draw_generator(self) -> np.random.Generator:
        """A fresh generator; the n-th call of a run always gives the same one."""
        self._draws += 1
        return generator(self.context.seed, type(self).__name__, self._draws)

    def choose(self, n: int) -> list[str]:
        """Ids of `n` distinct prompts to roll out next."""
        if n > len(self.pool):
            raise UserError(
                f"{n} prompts per step asked of a pool of {len(self.pool)}: lower data.prompts_per_step or add prompts"
            )
        return [self.pool.ids[position] for position in self.select(n)]

    def choose_references(self, n: int) -> list[str]:
        """Ids of `min(n, Q)` prompts whose measured difficulty should inform the rest; drawn uniformly."""
        positions = self.draw_generator().choice(len(self.pool), size=min(n, len(self.pool)), replace=False)
        return [self.pool.ids[position] for position in positions]

    def observe(self, outcomes: Outcomes) -> None:
        """Takes in measured success rates, of selected prompts or of reference prompts (`outcomes.source`)."""
        self.learn(self.pool.positions(outcomes.prompt_ids), outcomes)

    @abstractmethod
    def select(self, n: int) -> np.ndarray:
        """int64 `[n]` distinct pool positions, `n <= Q`."""

    def learn(self, positions: np.ndarray, outcomes: Outcomes) -> None:
        """Takes in outcomes; `positions` int64 `[N]` are the pool positions of `outcomes.prompt_ids`."""

    def forecast(self) -> np.ndarray | None:
        """float64 `[Q]`: expected success rate of every prompt under the policy now, or None if none is made."""
        return None

    def metrics(self) -> dict[str, float]:
        """Scalars for the log, by their full name (`selection/...`, `difficulty/...`)."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """Everything the next choice depends on, as tensors and plain values (loads with `weights_only=True`)."""
        return {"draws": self._draws, "pool": self.pool.fingerprint}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores `state_dict`. Raises UserError when it belongs to another pool."""
        if state["pool"] != self.pool.fingerprint:
            raise UserError(
                "the checkpoint's selector belongs to another prompt pool (ids, texts or order differ): "
                "resume with the same data, or start a new run"
            )
        self._draws = state["draws"]
