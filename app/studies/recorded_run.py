"""Replays a recorded run for a selector: it chooses, sees only what it chose, and is scored on everything."""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np

from app.reporting.forecast_quality import brier, pearson
from app.studies.traces import Traces
from datamodules.errors import UserError
from datamodules.pool import PromptPool
from datamodules.seeding import generator
from datamodules.selectors import SelectionContext, Selector
from datamodules.types import Outcomes, Source


@dataclass(frozen=True, slots=True)
class Budget:
    """What a step may roll out.

    Attributes:
        prompts: chosen per step.
        references: prompts of a reference set, `K`; 0 for none.
        every: steps between two reference sets, the first one before step 0.
    """

    prompts: int
    references: int = 0
    every: int = 1

    @property
    def rollouts_per_step(self) -> float:
        """Prompts rolled out per step, reference prompts included, in the long run."""
        return self.prompts + self.references / self.every

    def within(self, rollouts: int) -> Budget:
        """This budget cut to `rollouts` prompts per step: references first, but never more than half of it."""
        references = min(self.references, self.every * (rollouts // 2))
        return Budget(rollouts - -(-references // self.every), references, self.every)


@dataclass(frozen=True, slots=True, eq=False)
class Replay:
    """What a selector did at every visit and how good it was, float64 `[V]` where nothing else is said.

    Attributes:
        chosen: int64 `[V, prompts]` pool positions, in the order of the choice.
        informative: share of the chosen prompts with a recorded rate strictly between 0 and 1.
        variance: mean of p (1 - p) over the chosen prompts.
        pearson: correlation of the forecast made before the rollouts with the recorded rates of all `Q` prompts; NaN
            where there was no forecast or it was constant.
        pearson_unmeasured: the same over the prompts that were in no reference set of this very visit.
        brier: mean squared error of that forecast over all prompts; NaN where there was none.
        distinct: share of the pool chosen so far, this visit included.
        rollouts: prompts rolled out, references included.
        seconds: spent in the selector (references, forecast, choice, learning).
    """

    chosen: np.ndarray
    informative: np.ndarray
    variance: np.ndarray
    pearson: np.ndarray
    pearson_unmeasured: np.ndarray
    brier: np.ndarray
    distinct: np.ndarray
    rollouts: np.ndarray
    seconds: np.ndarray


def revealed(traces: Traces, samples: int, seed: int | None) -> np.ndarray:
    """float64 `[Q, V]`: what a selector sees of a prompt that it chose.

    Args:
        traces: the recorded rates `p`.
        samples: completions of a group, `G`.
        seed: None reveals `p` itself; else a draw of Binomial(G, p) / G, the same for every selector.
    """
    if seed is None:
        return traces.rates
    return generator(seed, "forecast", "resample").binomial(samples, traces.rates) / samples


def replay(
    selector: Selector,
    traces: Traces,
    budget: Budget,
    context: SelectionContext,
    *,
    shown: np.ndarray,
    samples: int,
    reveal_all: bool = False,
) -> Replay:
    """Runs a new selector through all visits.

    Args:
        selector: not set up yet.
        traces: recorded rates: what is scored against.
        budget: prompts and references of a step; references are drawn only for a selector that uses them.
        context: seed, encoder and cache of the selector.
        shown: float64 `[Q, V]` rates that the selector learns from (`revealed`).
        samples: completions behind a shown rate.
        reveal_all: whether every prompt's outcome is shown after a step, at no cost (the ceiling).

    Raises UserError for a batch larger than the pool, and for a selector that breaks its contract.
    """
    size, visits = traces.rates.shape
    if not 0 < budget.prompts <= size:
        raise UserError(f"--batch asks for {budget.prompts} prompts of a pool of {size}: give 1 to {size}")
    pool = traces.pool()
    selector.setup(pool, context)
    player = _Player(selector, pool, budget, shown, samples)
    used = np.zeros(size, dtype=bool)
    steps = []
    for visit in range(visits):
        started = time.perf_counter()
        measured = player.reference_rollouts(visit)
        chosen = player.choice()
        # As in a run: a selector that moves its belief on from step to step does so when it is asked to choose.
        forecast = player.forecast()
        player.observe(np.arange(size) if reveal_all else chosen, visit, "fresh")
        seconds = time.perf_counter() - started
        used[chosen] = True
        scores = _scores(forecast, traces.rates[:, visit], chosen, measured)
        steps.append((chosen, *scores, used.mean(), len(chosen) + len(measured), seconds))
    return Replay(*(np.array(column) for column in zip(*steps, strict=True)))


class _Player:
    """Hands a selector what a run would: ids to choose, and outcomes of what was rolled out."""

    def __init__(self, selector: Selector, pool: PromptPool, budget: Budget, shown: np.ndarray, samples: int) -> None:
        self._selector, self._pool, self._budget = selector, pool, budget
        self._shown, self._samples = shown, samples

    def reference_rollouts(self, visit: int) -> np.ndarray:
        """Positions measured before the choice; none where no reference set is due or the selector has no use."""
        due = self._budget.references and visit % self._budget.every == 0
        if not due or not self._selector.uses_references:
            return np.empty(0, dtype=np.int64)
        positions = self._pool.positions(self._selector.choose_references(self._budget.references))
        self.observe(positions, visit, "reference")
        return positions

    def forecast(self) -> np.ndarray | None:
        expected = self._selector.forecast()
        if expected is not None and (expected.shape != (len(self._pool),) or not np.isfinite(expected).all()):
            raise UserError(
                f"{type(self._selector).__name__}.forecast() gave shape {expected.shape} or values that are not "
                f"finite, expected {len(self._pool)} success rates"
            )
        # A selector may go on working in the array that it has handed out.
        return None if expected is None else expected.copy()

    def choice(self) -> np.ndarray:
        """Positions of the next choice."""
        wanted = self._budget.prompts
        positions = self._pool.positions(self._selector.choose(wanted))
        if len(positions) != wanted or len(np.unique(positions)) != wanted:
            raise UserError(
                f"{type(self._selector).__name__}.choose({wanted}) gave {len(positions)} prompts, "
                f"{len(np.unique(positions))} of them distinct: expected {wanted} distinct ones"
            )
        return positions

    def observe(self, positions: np.ndarray, visit: int, source: Source) -> None:
        rates = self._shown[positions, visit]
        self._selector.observe(
            Outcomes(
                step=visit,
                prompt_ids=[self._pool.ids[position] for position in positions],
                success_rate=rates,
                samples=np.full(len(positions), self._samples, dtype=np.int64),
                source=source,
                reward_std=np.sqrt(rates * (1 - rates)),
            )
        )


def _scores(
    forecast: np.ndarray | None, rates: np.ndarray, chosen: np.ndarray, measured: np.ndarray
) -> tuple[float, float, float, float, float]:
    """Informative share, variance, Pearson, Pearson over the unmeasured, Brier: see `Replay`."""
    p = rates[chosen]
    of_choice = float(np.mean((p > 0) & (p < 1))), float(np.mean(p * (1 - p)))
    if forecast is None:
        return (*of_choice, np.nan, np.nan, np.nan)
    others = np.ones(len(rates), dtype=bool)
    others[measured] = False
    return (
        *of_choice,
        pearson(forecast, rates),
        pearson(forecast[others], rates[others]),
        brier(forecast, rates),
    )
