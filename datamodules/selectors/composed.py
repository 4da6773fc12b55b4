"""Filters, a cool-down and a floor of uniform exploration around any ranker."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch

from datamodules.errors import UserError
from datamodules.pool import PromptPool
from datamodules.selectors.base import NOBODY, Ranker, SelectionContext, Selector
from datamodules.selectors.filters import Filter
from datamodules.selectors.sampling import top_k
from datamodules.types import Outcomes

_NEVER = -(2**62)


class Composed(Selector):
    """Chooses by a ranker, within rules that any ranker can stand under.

    A choice of n prompts is made in this order. Prompts chosen in the last `cool_down` steps rest. A share `explore`
    is drawn uniformly from all that do not rest, whatever the filters say: every prompt stays reachable, and the drawn
    ones are an unbiased sample of those (`explored_ids`). The ranker's best of those that every filter admits fill
    the rest. Where too few are left, the least recently chosen are taken, so that a choice is never short; they are
    counted as `selection/fallback_fraction`.

    Without filters, cool-down and exploration the choices are the ranker's own.

    Args:
        ranker: orders the prompts: any selector that is a `Ranker` (all of this package but `Composed` and `Greso`).
        filters: rules that keep prompts out, such as `ZeroVarianceSkip`.
        cool_down: steps for which a chosen prompt is not chosen again, >= 0. A refill belongs to its step.
        explore: share of all choices that is drawn uniformly, in [0, 1]. Fractions of a prompt carry over to the next
            choice: after any number of choices of n_1, n_2, ... prompts, floor(explore * (n_1 + n_2 + ...)) were drawn.
    """

    def __init__(
        self, ranker: Ranker, filters: list[Filter] | None = None, cool_down: int = 0, explore: float = 0.0
    ) -> None:
        super().__init__()
        if cool_down < 0:
            raise UserError(
                f"cool_down is {cool_down}, expected a number of steps >= 0: 0 lets every prompt come again"
            )
        if not 0 <= explore <= 1:
            raise UserError(f"explore is {explore}, expected a share of the choices in [0, 1]: 0 explores nothing")
        self.ranker = ranker
        self.filters = filters or []
        self.cool_down, self.explore = cool_down, explore
        self.uses_references = ranker.uses_references
        self._last_chosen = NOBODY
        self._owed = 0.0
        self._explored = NOBODY
        self._fallbacks = 0

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
        self._explored, self._fallbacks = NOBODY, 0
        self.ranker.begin_step()
        for each in self.filters:
            each.begin_step()

    def select(self, n: int, excluded: np.ndarray = NOBODY) -> np.ndarray:
        rng = self.draw_generator()
        allowed = np.ones(len(self.pool), dtype=bool)
        allowed[excluded] = False
        rested = allowed & (self._steps - self._last_chosen > self.cool_down)
        explored = self._draw_explored(n, rested, rng)
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

    def _draw_explored(self, n: int, rested: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """int64 `[E]`: positions drawn uniformly from `rested`, as many as the share owes by now."""
        self._owed += self.explore * n
        # The sum of many fractions may end just below the whole number that it stands for.
        due = min(math.floor(self._owed + 1e-9), n, int(rested.sum()))
        self._owed -= due
        return rng.choice(np.flatnonzero(rested), size=due, replace=False) if due else NOBODY

    def _rank(
        self, n: int, open_places: int, rested: np.ndarray, rng: np.random.Generator
    ) -> tuple[np.ndarray, np.ndarray]:
        """Positions of the ranker's best for the places still open, fewer when the rules leave fewer.

        With them, the positions that a filter refused though they came before the last of these.
        """
        own_rng = self.ranker.draw_generator()
        priorities = self.ranker.priorities(n, own_rng)
        wanted = rested & (priorities > -np.inf)
        admitted = wanted.copy()
        for each in self.filters:
            admitted &= each.admits(rng)
        found = int(admitted.sum())
        ranked = top_k(priorities, min(open_places, found), own_rng, admitted)
        if not open_places:
            return ranked, NOBODY
        last = priorities[ranked[-1]] if found >= open_places else -np.inf
        return ranked, np.flatnonzero(wanted & ~admitted & (priorities >= last))

    def choose_references(self, n: int) -> list[str]:
        return self.ranker.choose_references(n)

    def learn(self, positions: np.ndarray, outcomes: Outcomes) -> None:
        self.ranker.learn(positions, outcomes)
        for each in self.filters:
            each.learn(positions, outcomes)

    def forecast(self) -> np.ndarray | None:
        return self.ranker.forecast()

    def refill_size(self, missing: int, default: int, kept_fraction: float) -> int:
        sizes = [size for each in self.filters if (size := each.refill_size(missing, default, kept_fraction))]
        return max(sizes) if sizes else self.ranker.refill_size(missing, default, kept_fraction)

    def metrics(self) -> dict[str, float]:
        values = self.ranker.metrics()
        for each in self.filters:
            values |= each.metrics()
        chosen = max(1, len(self._chosen_now))
        return values | {
            "selection/explored_fraction": len(self._explored) / chosen,
            "selection/fallback_fraction": self._fallbacks / chosen,
        }

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {
            "ranker": self.ranker.state_dict(),
            "filters": {type(each).__name__: each.state_dict() for each in self.filters},
            "last_chosen": torch.from_numpy(self._last_chosen.copy()),
            "owed": self._owed,
            "explored": torch.from_numpy(self._explored.copy()),
            "fallbacks": self._fallbacks,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.ranker.load_state_dict(state["ranker"])
        names = [type(each).__name__ for each in self.filters]
        if names != list(state["filters"]):
            raise UserError(
                f"the checkpoint's selector has the filters {list(state['filters'])}, this run has {names}: "
                "resume with the same data.selector, or start a new run"
            )
        for each, saved in zip(self.filters, state["filters"].values(), strict=True):
            each.load_state_dict(saved)
        self._last_chosen = state["last_chosen"].numpy().copy()
        self._owed, self._fallbacks = state["owed"], state["fallbacks"]
        self._explored = state["explored"].numpy().copy()
