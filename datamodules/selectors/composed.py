"""Filters, a cool-down and uniform exploration around any ranker."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from datamodules.errors import UserError
from datamodules.pool import PromptPool
from datamodules.selectors.base import NO_PROMPTS, Ranker, SelectionContext, Selector
from datamodules.selectors.sampling import top_k
from datamodules.types import GroupSketch, Outcomes

_NEVER = -(2**62)


class Filter(ABC):
    """A rule that keeps prompts out of a choice, independent of the ranker."""

    def setup(self, pool: PromptPool, context: SelectionContext) -> None:
        """Attach the pool. Called once, before the first choice."""

    def begin_step(self) -> None:
        """Start a training step. Called before its first choice."""

    @abstractmethod
    def admits(self, rng: np.random.Generator) -> np.ndarray:
        """Return the bool `[Q]` mask of prompts that this choice may take. Must not change the state."""

    def learn(self, positions: np.ndarray, outcomes: Outcomes) -> None:
        """See `Selector.learn`."""

    def refill_size(self, missing: int, default: int, kept_fraction: float) -> int | None:
        """See `Selector.refill_size`; None leaves the decision to the ranker."""
        return None

    def metrics(self) -> dict[str, float]:
        """See `Selector.metrics`."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """See `Selector.state_dict`."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the state."""


class Composed(Selector):
    """Chooses by a ranker, subject to filters, a cool-down and exploration.

    A choice of n prompts is made in this order:

    1. Prompts chosen in the last `cool_down` steps are not eligible.
    2. A share `explore` is drawn uniformly from the eligible prompts, ignoring the filters. Every prompt stays
       reachable, and the drawn ones are an unbiased sample (`explored_ids`).
    3. The rest are the ranker's best among the eligible prompts that all filters admit.
    4. If too few remain, the least recently chosen prompts fill the choice, counted as `selection/fallback_fraction`.

    Without filters, cool-down and exploration the choices are the ranker's own.

    Args:
        ranker: orders the prompts: any `Ranker`, that is any selector of this package but `Composed` and `Greso`.
        filters: rules that keep prompts out, such as `ZeroVarianceSkip`.
        cool_down: number of steps for which a chosen prompt is not chosen again, >= 0. A refill belongs to its step.
        explore: share of all choices that is drawn uniformly, in [0, 1]. Fractions of a prompt carry over: after
            choices of n_1, n_2, ... prompts, floor(explore * (n_1 + n_2 + ...)) were drawn.
    """

    def __init__(
        self, ranker: Ranker, filters: list[Filter] | None = None, cool_down: int = 0, explore: float = 0.0
    ) -> None:
        super().__init__()
        if cool_down < 0:
            raise UserError(f"cool_down is {cool_down}, expected a number of steps >= 0. Use 0 to switch it off.")
        if not 0 <= explore <= 1:
            raise UserError(f"explore is {explore}, expected a share of the choices in [0, 1]. Use 0 to switch it off.")
        self.ranker = ranker
        self.filters = filters or []
        self.cool_down, self.explore = cool_down, explore
        self.uses_references, self.uses_sketches = ranker.uses_references, ranker.uses_sketches
        self._last_chosen = NO_PROMPTS
        """int64 `[Q]`: step in which each prompt was last chosen."""
        self._owed = 0.0
        """Prompts still to be explored, as a fraction."""
        self._explored = NO_PROMPTS
        self._fallbacks = 0

    @property
    def _names(self) -> list[str]:
        """Names of the filters' states: the class, then `CLASS.2`, `CLASS.3` for its further filters."""
        return [type(each).__name__ + number for each, number in zip(self.filters, self._numbers, strict=True)]

    @property
    def _numbers(self) -> list[str]:
        """Endings that keep filters of one class apart in states and metrics: none, then `.2`, `.3`."""
        classes = [type(each).__name__ for each in self.filters]
        counts = [classes[: place + 1].count(name) for place, name in enumerate(classes)]
        return ["" if count == 1 else f".{count}" for count in counts]

    @property
    def explored_ids(self) -> frozenset[str]:
        return frozenset(self.pool.ids[position] for position in self._explored.tolist())

    def setup(self, pool: PromptPool, context: SelectionContext) -> None:
        super().setup(pool, context)
        self._last_chosen = np.full(len(pool), _NEVER)
        self.ranker.setup(pool, context)
        for each in self.filters:
            each.setup(pool, context)

    def begin_step(self) -> None:
        super().begin_step()
        self._explored, self._fallbacks = NO_PROMPTS, 0
        self.ranker.begin_step()
        for each in self.filters:
            each.begin_step()

    def select(self, n: int, excluded: np.ndarray = NO_PROMPTS) -> np.ndarray:
        rng = self.draw_generator()
        allowed = np.ones(len(self.pool), dtype=bool)
        allowed[excluded] = False
        rested = allowed & (self._steps - self._last_chosen > self.cool_down)
        explored = self._explore(n, rested, rng)
        rested[explored] = False
        ranked, passed_over = self._rank(n, n - len(explored), rested, rng)
        allowed[ranked] = allowed[explored] = False
        fallback = top_k(-self._last_chosen.astype(np.float64), n - len(ranked) - len(explored), rng, allowed)
        chosen = np.concatenate([ranked, explored, fallback])
        self.ranker.settle(chosen, passed_over)
        self._last_chosen[chosen] = self._steps
        self._explored = np.concatenate([self._explored, explored])
        self._fallbacks += len(fallback)
        return chosen

    def _explore(self, n: int, rested: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Draw uniformly from `rested` as many positions as a choice of `n` owes to exploration."""
        self._owed += self.explore * n
        # A sum of fractions may end just below the whole number it stands for.
        due = min(math.floor(self._owed + 1e-9), n, int(rested.sum()))
        self._owed -= due
        return rng.choice(np.flatnonzero(rested), size=due, replace=False) if due else NO_PROMPTS

    def _rank(self, n: int, places: int, rested: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """Return the ranker's best admitted positions, at most `places`, and those passed over (see `settle`)."""
        own_rng = self.ranker.draw_generator()
        priorities = self.ranker.priorities(n, own_rng)
        wanted = rested & (priorities > -np.inf)
        admitted = wanted.copy()
        for each in self.filters:
            admitted &= each.admits(rng)
        found = int(admitted.sum())
        ranked = top_k(priorities, min(places, found), own_rng, admitted)
        if not places:
            return ranked, NO_PROMPTS
        last = priorities[ranked[-1]] if found >= places else -np.inf
        return ranked, np.flatnonzero(wanted & ~admitted & (priorities >= last))

    def choose_references(self, n: int) -> list[str]:
        return self.ranker.choose_references(n)

    def learn(self, positions: np.ndarray, outcomes: Outcomes) -> None:
        self.ranker.learn(positions, outcomes)
        for each in self.filters:
            each.learn(positions, outcomes)

    def observe_gradients(self, sketches: Sequence[GroupSketch]) -> None:
        self.ranker.observe_gradients(sketches)

    def updated(self, size: float) -> None:
        self.ranker.updated(size)

    @property
    def forecasts(self) -> bool:
        return self.ranker.forecasts

    def forecast(self) -> np.ndarray | None:
        return self.ranker.forecast()

    def forecast_deviation(self) -> np.ndarray | None:
        return self.ranker.forecast_deviation()

    def informative_chance(self) -> np.ndarray | None:
        return self.ranker.informative_chance()

    def refill_size(self, missing: int, default: int, kept_fraction: float) -> int:
        sizes = [size for each in self.filters if (size := each.refill_size(missing, default, kept_fraction))]
        return max(sizes) if sizes else self.ranker.refill_size(missing, default, kept_fraction)

    def metrics(self) -> dict[str, float]:
        values = self.ranker.metrics()
        for each, number in zip(self.filters, self._numbers, strict=True):
            values |= {f"{metric}{number}": value for metric, value in each.metrics().items()}
        chosen = max(1, len(self._chosen_now))
        return values | {
            "selection/explored_fraction": len(self._explored) / chosen,
            "selection/fallback_fraction": self._fallbacks / chosen,
        }

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {
            "ranker": self.ranker.state_dict(),
            "filters": {name: each.state_dict() for name, each in zip(self._names, self.filters, strict=True)},
            "last_chosen": torch.from_numpy(self._last_chosen.copy()),
            "owed": self._owed,
            "explored": torch.from_numpy(self._explored.copy()),
            "fallbacks": self._fallbacks,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.ranker.load_state_dict(state["ranker"])
        if self._names != list(state["filters"]):
            raise UserError(
                f"Cannot resume: the checkpoint's selector has the filters {list(state['filters'])}, this run has "
                f"{self._names}. Resume with the same data.selector or start a new run."
            )
        for each, saved in zip(self.filters, state["filters"].values(), strict=True):
            each.load_state_dict(saved)
        self._last_chosen = state["last_chosen"].numpy().copy()
        self._owed, self._fallbacks = state["owed"], state["fallbacks"]
        self._explored = state["explored"].numpy().copy()
