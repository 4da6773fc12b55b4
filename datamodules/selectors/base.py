"""The interface of every selection method."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from datamodules.errors import UserError
from datamodules.mixture import Mixture
from datamodules.pool import PromptPool
from datamodules.seeding import generator
from datamodules.selectors.sampling import top_k
from datamodules.types import GroupSketch, Outcomes

NO_PROMPTS = np.empty(0, dtype=np.int64)
"""An empty array of pool positions."""


@dataclass(frozen=True, slots=True)
class SelectionContext:
    """The part of a run's settings that selectors read.

    Attributes:
        seed: seed of the run.
        policy_path: folder or hub name of the policy's initial weights, which are the default text encoder.
        cache_dir: folder in which embeddings are cached across runs.
    """

    seed: int
    policy_path: str | None = None
    cache_dir: Path = Path("~/.cache/dots")


class Selector(ABC):
    """Chooses the prompts to roll out next from the outcomes of earlier rollouts.

    Subclasses implement `select` and, if they learn, `learn`, `forecast`, `state_dict` and `load_state_dict`, all
    vectorised over pool positions. Most methods only rank the prompts: see `Ranker`. Every random draw comes from
    `draw_generator`, which depends on the seed and on a counter that is saved, so a restored selector makes the same
    choices.

    Attributes:
        uses_references: whether the method needs reference rollouts. Any method may learn from them.
        uses_sketches: whether every update makes sketches of its groups' gradients for `observe_gradients`.
    """

    uses_references: bool = False
    uses_sketches: bool = False

    def __init__(self) -> None:
        self._pool: PromptPool | None = None
        self._seed = 0
        self._draws = 0
        self._steps = 0
        self._chosen_now = NO_PROMPTS
        self._owed_to_sources = np.empty(0)
        """float64 `[S]`: prompts, and fractions of one, that are still due to each source of a mixture."""

    def setup(self, pool: PromptPool, context: SelectionContext) -> None:
        """Attach the pool, and embed it where the method reads texts. Called once, before the first choice.

        Raises:
            UserError: a text encoder or predictor is unusable.
        """
        self._pool, self._seed = pool, context.seed
        if isinstance(pool, Mixture):
            self._owed_to_sources = np.zeros(len(pool.parts))

    @property
    def is_ready(self) -> bool:
        """Whether `setup` has been called."""
        return self._pool is not None

    @property
    def pool(self) -> PromptPool:
        """The pool to choose from."""
        if self._pool is None:
            raise RuntimeError(f"{type(self).__name__} has no pool yet. Call setup() first.")
        return self._pool

    @property
    def forecasts(self) -> bool:
        """Whether `forecast` returns success rates, if perhaps not before the method has learnt something."""
        return type(self).forecast is not Selector.forecast

    @property
    def explored_ids(self) -> frozenset[str]:
        """Ids chosen in this step by uniform exploration: an unbiased sample of the eligible prompts."""
        return frozenset()

    def choose(self, n: int, exclude: Collection[str] = (), refill: bool = False) -> list[str]:
        """Return the ids of distinct prompts to roll out next.

        Args:
            n: number of prompts.
            exclude: ids that must not be chosen.
            refill: whether to extend the choice of the current step instead of starting a new one. A refill never
                repeats prompts of its step and returns fewer than `n` when fewer are left.

        Raises:
            UserError: fewer than `n` prompts are available, outside a refill.
        """
        if not refill:
            self.begin_step()
        excluded = np.unique(np.concatenate([self.pool.positions(exclude), self._chosen_now]))
        left = len(self.pool) - len(excluded)
        if n > left and not refill:
            raise UserError(
                f"data.prompts_per_step is {n} but only {left} prompts can be chosen. "
                "Lower data.prompts_per_step or add prompts."
            )
        chosen = self._select_from_sources(min(n, left), excluded)
        self._chosen_now = np.concatenate([self._chosen_now, chosen])
        return [self.pool.ids[position] for position in chosen]

    def _select_from_sources(self, n: int, excluded: np.ndarray) -> np.ndarray:
        """Select what is due to each source of a mixture, then the rest among all prompts.

        By priority this is the best choice in which every source has its due.
        """
        if not isinstance(self.pool, Mixture) or not any(self.pool.floors.values()):
            return self.select(n, excluded)
        source_of, found = self.pool.source_of, NO_PROMPTS
        free = np.ones(len(source_of), dtype=bool)
        free[excluded] = False
        left = np.bincount(source_of[free], minlength=len(self.pool.parts))
        for source, due in enumerate(self.pool.quotas(n, self._owed_to_sources, left)):
            if due:
                chosen = self.select(int(due), np.flatnonzero(~free | (source_of != source)))
                free[chosen] = False
                found = np.concatenate([found, chosen])
        if len(found) == n:
            return found
        return np.concatenate([found, self.select(n - len(found), np.flatnonzero(~free))])

    def choose_references(self, n: int) -> list[str]:
        """Return the ids of `min(n, Q)` uniformly drawn prompts whose measured difficulty informs the forecasts."""
        positions = self.draw_generator().choice(len(self.pool), size=min(n, len(self.pool)), replace=False)
        return [self.pool.ids[position] for position in positions]

    def observe(self, outcomes: Outcomes) -> None:
        """Learn from the measured success rates of selected or reference prompts (see `outcomes.source`)."""
        self.learn(self.pool.positions(outcomes.prompt_ids), outcomes)

    def observe_gradients(self, sketches: Sequence[GroupSketch]) -> None:
        """Learn from the gradients of the groups with advantages that an update trained on, if `uses_sketches`."""

    def updated(self, size: float) -> None:
        """Learn the size of an update of the policy, its learning rate times its gradient norm, when it is done."""

    def forecast(self) -> np.ndarray | None:
        """Return the expected success rate of every prompt under the current policy, float64 `[Q]`, if there is one."""
        return None

    def forecast_deviation(self) -> np.ndarray | None:
        """Return the standard deviation of every forecast, float64 `[Q]`, if the method knows it."""
        return None

    def informative_chance(self) -> np.ndarray | None:
        """Return the probability that a group of each prompt is informative now, float64 `[Q]`, if the method has one.

        It is of its own, not what follows from `forecast` as if that were certain.
        """
        return None

    def refill_size(self, missing: int, default: int, kept_fraction: float) -> int:
        """Return the number of prompts to request in a refill, when a batch still lacks `missing` groups.

        `default` is the largest refill, a full first choice; `kept_fraction` is the share of this step's groups kept.
        """
        return min(missing, default)

    def metrics(self) -> dict[str, float]:
        """Return scalars to log, by full name (`selection/...`, `difficulty/...`)."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """Return the state that future choices depend on, as tensors and plain values (for `weights_only=True`)."""
        state = {
            "selector": type(self).__name__,
            "pool": self.pool.fingerprint,
            "draws": self._draws,
            "steps": self._steps,
            "chosen_now": torch.from_numpy(self._chosen_now.copy()),
        }
        if len(self._owed_to_sources):
            state["owed_to_sources"] = torch.from_numpy(self._owed_to_sources.copy())
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the state. Raises UserError if it was saved with another pool or another method."""
        if state["pool"] != self.pool.fingerprint:
            raise UserError(
                "Cannot resume: the checkpoint was saved with another prompt pool (ids, texts or order differ). "
                "Resume with the same data or start a new run."
            )
        if state["selector"] != type(self).__name__:
            raise UserError(
                f"Cannot resume: the checkpoint holds the state of selector {state['selector']}, this run has "
                f"{type(self).__name__}. Resume with the same data.selector or start a new run."
            )
        self._draws, self._steps = state["draws"], state["steps"]
        self._chosen_now = state["chosen_now"].numpy().copy()
        if "owed_to_sources" in state:
            self._owed_to_sources = state["owed_to_sources"].numpy().copy()

    # For subclasses.

    def draw_generator(self) -> np.random.Generator:
        """Return a new generator. The n-th call of a run always returns the same one."""
        self._draws += 1
        return generator(self._seed, type(self).__name__, self._draws)

    def begin_step(self) -> None:
        """Start a training step. Called before its first choice; overrides must call this method too."""
        self._steps += 1
        self._chosen_now = NO_PROMPTS

    @abstractmethod
    def select(self, n: int, excluded: np.ndarray = NO_PROMPTS) -> np.ndarray:
        """Return int64 `[n]` distinct pool positions outside `excluded` (int64 `[E]`), with `n <= Q - E`."""

    def learn(self, positions: np.ndarray, outcomes: Outcomes) -> None:
        """Learn from outcomes whose prompts are at the pool positions `positions`, int64 `[N]`."""


class Ranker(Selector):
    """A selector that gives every prompt a priority and takes the largest; random draws rank by noisy priorities.

    `Composed` adds filters, a cool-down and exploration to any ranker.
    """

    @abstractmethod
    def priorities(self, n: int, rng: np.random.Generator) -> np.ndarray:
        """Return float64 `[Q]` priorities for a choice of about `n` prompts, without NaN.

        Larger values come first, equal ones in random order, -inf last. Must not change the state: use `settle`.
        """

    def settle(self, chosen: np.ndarray, passed_over: np.ndarray = NO_PROMPTS) -> None:
        """Update the state after the choice of the positions `chosen`.

        A filter refused the positions `passed_over` although they ranked above the last ranked choice. In a method that
        works through the pool in passes, they have had their turn.
        """

    def select(self, n: int, excluded: np.ndarray = NO_PROMPTS) -> np.ndarray:
        rng = self.draw_generator()
        priorities = self.priorities(n, rng)
        eligible = np.ones(len(priorities), dtype=bool)
        eligible[excluded] = False
        chosen = top_k(priorities, n, rng, eligible)
        self.settle(chosen)
        return chosen
