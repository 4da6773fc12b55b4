"""The interface of every selection method."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from datamodules.errors import UserError
from datamodules.pool import PromptPool
from datamodules.seeding import generator
from datamodules.selectors.sampling import top_k
from datamodules.types import Outcomes

NOBODY = np.empty(0, dtype=np.int64)
"""No pool position."""


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
    pool and in pool positions. Most methods only have to say how much they want each prompt: see `Ranker`. Every
    random draw comes from `self.draw_generator()`, which depends on the run's seed and a counter that is part of the
    state: a restored selector continues with identical choices.

    Attributes:
        uses_references: whether it stands on reference rollouts (a method may take them in without needing them).
        explored_ids: the prompts chosen in this step by uniform exploration: an unbiased sample of what could be
            chosen.
    """

    uses_references: bool = False

    def __init__(self) -> None:
        self._pool: PromptPool | None = None
        self._context: SelectionContext | None = None
        self._draws = 0
        self._steps = 0
        self._chosen_now = NOBODY

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

    @property
    def explored_ids(self) -> frozenset[str]:
        return frozenset()

    def setup(self, pool: PromptPool, context: SelectionContext) -> None:
        """Called once, before the first choice."""
        self._pool, self._context = pool, context

    def draw_generator(self) -> np.random.Generator:
        """A fresh generator; the n-th call of a run always gives the same one."""
        self._draws += 1
        return generator(self.context.seed, type(self).__name__, self._draws)

    def choose(self, n: int, exclude: Collection[str] = (), refill: bool = False) -> list[str]:
        """Ids of distinct prompts to roll out next, none of them in `exclude`.

        Args:
            n: how many.
            exclude: ids that must not be chosen.
            refill: whether this adds to the choice of a step that has begun, so that no new step is counted. What
                that step chose is not chosen again, and where fewer than `n` prompts are left, those are given.

        Raises:
            UserError: fewer than `n` prompts can be chosen from, and it is no refill.
        """
        if not refill:
            self.begin_step()
        excluded = np.unique(np.concatenate([self.pool.positions(exclude), self._chosen_now]))
        left = len(self.pool) - len(excluded)
        if n > left and not refill:
            raise UserError(
                f"{n} prompts per step asked of a pool of {left}: lower data.prompts_per_step or add prompts"
            )
        chosen = self.select(min(n, left), excluded)
        self._chosen_now = np.concatenate([self._chosen_now, chosen])
        return [self.pool.ids[position] for position in chosen]

    def choose_references(self, n: int) -> list[str]:
        """Ids of `min(n, Q)` prompts whose measured difficulty should inform the rest; drawn uniformly."""
        positions = self.draw_generator().choice(len(self.pool), size=min(n, len(self.pool)), replace=False)
        return [self.pool.ids[position] for position in positions]

    def observe(self, outcomes: Outcomes) -> None:
        """Takes in measured success rates, of selected prompts or of reference prompts (`outcomes.source`)."""
        self.learn(self.pool.positions(outcomes.prompt_ids), outcomes)

    def begin_step(self) -> None:
        """Called once for every training step, before its first choice; overriders call this one too."""
        self._steps += 1
        self._chosen_now = NOBODY

    @abstractmethod
    def select(self, n: int, excluded: np.ndarray = NOBODY) -> np.ndarray:
        """int64 `[n]` distinct pool positions, none among `excluded` (int64 `[E]`); `n <= Q - E`."""

    def learn(self, positions: np.ndarray, outcomes: Outcomes) -> None:
        """Takes in outcomes; `positions` int64 `[N]` are the pool positions of `outcomes.prompt_ids`."""

    def forecast(self) -> np.ndarray | None:
        """float64 `[Q]`: expected success rate of every prompt under the policy now, or None if none is made."""
        return None

    def refill_size(self, missing: int, default: int, kept_fraction: float) -> int:
        """How many prompts to ask for in a refill.

        Args:
            missing: groups that the batch still lacks.
            default: prompts of a full first choice; no refill is larger.
            kept_fraction: share of the groups rolled out in this step that were kept.
        """
        return min(missing, default)

    def metrics(self) -> dict[str, float]:
        """Scalars for the log, by their full name (`selection/...`, `difficulty/...`)."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """Everything the next choice depends on, as tensors and plain values (loads with `weights_only=True`)."""
        return {
            "selector": type(self).__name__,
            "pool": self.pool.fingerprint,
            "draws": self._draws,
            "steps": self._steps,
            "chosen_now": torch.from_numpy(self._chosen_now.copy()),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores `state_dict`. Raises UserError when it belongs to another pool or another method."""
        if state["pool"] != self.pool.fingerprint:
            raise UserError(
                "the checkpoint's selector belongs to another prompt pool (ids, texts or order differ): "
                "resume with the same data, or start a new run"
            )
        if state["selector"] != type(self).__name__:
            raise UserError(
                f"the checkpoint holds the state of selector {state['selector']}, this run has "
                f"{type(self).__name__}: resume with the same data.selector, or start a new run"
            )
        self._draws, self._steps = state["draws"], state["steps"]
        self._chosen_now = state["chosen_now"].numpy().copy()


class Ranker(Selector):
    """A selector that gives every prompt a priority and takes the largest; a draw is a ranking with noise in it.

    `Composed` puts filters, a cool-down and exploration around any of these.
    """

    @abstractmethod
    def priorities(self, n: int, rng: np.random.Generator) -> np.ndarray:
        """float64 `[Q]`, no NaN: how much each prompt is wanted now, when about `n` are to be chosen.

        Larger comes first, equal ones in random order, -inf last. Must not change the state: what a choice changes
        belongs in `settle`.
        """

    def settle(self, chosen: np.ndarray, passed_over: np.ndarray = NOBODY) -> None:
        """Told of every choice: the positions taken, and those refused by a filter though they came before the last.

        Matters to a method that goes through the pool in passes, where a refused prompt has had its turn.
        """

    def select(self, n: int, excluded: np.ndarray = NOBODY) -> np.ndarray:
        rng = self.draw_generator()
        priorities = self.priorities(n, rng)
        open_to_choice = np.ones(len(priorities), dtype=bool)
        open_to_choice[excluded] = False
        chosen = top_k(priorities, n, rng, open_to_choice)
        self.settle(chosen)
        return chosen
