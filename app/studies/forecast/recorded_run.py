"""Replay a recorded run for a selector: it chooses, sees only what it chose, and is scored on all prompts.

A recorded run holds the pass rate that every prompt of a pool had at every visit.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from app.reporting.forecast_quality import brier, informative_probability, pearson, reliability
from datamodules.errors import UserError
from datamodules.jsonl import read_objects
from datamodules.pool import PromptPool
from datamodules.seeding import generator
from datamodules.selectors import SelectionContext, Selector
from datamodules.types import Outcomes, Prompt, Source

QUESTION = "question"
RATES = "pass_rate_by_epoch"


@dataclass(frozen=True, slots=True, eq=False)
class Traces:
    """The questions of a recorded run and their pass rates.

    Attributes:
        ids: `Q` names: the question's row in the file, counted from 0.
        questions: `Q` raw texts.
        rates: float64 `[Q, V]` success rate of every question at visit 0, 1, ... `V - 1`.
        first: visit of the run in column 0.
        columns: what else the file says of each question; empty where it says nothing.
    """

    ids: tuple[str, ...]
    questions: tuple[str, ...]
    rates: np.ndarray
    first: int = 0
    columns: tuple[Mapping[str, object], ...] = ()

    def cut(self, first: int, visits: int | None) -> Traces:
        """Return the traces from visit `first`, `visits` of them (None: all the rest). Raise UserError for too few."""
        recorded = self.rates.shape[1]
        last = recorded if visits is None else first + visits
        if first < 0 or last > recorded or last - first < 2:
            given = f"--from is {first}" + ("" if visits is None else f" and --visits is {visits}")
            raise UserError(
                f"{given}, but the shortest trace has {recorded} visits, counted from 0, and a study needs at least 2. "
                "Lower --from or --visits, or leave short traces out of the file."
            )
        return replace(self, rates=self.rates[:, first:last], first=self.first + first)

    def shuffled(self) -> Traces:
        """Return the questions in a random order, always the same one (so that their embeddings are cached once)."""
        order = generator("forecast", "question order").permutation(len(self.ids))
        ids, questions = (tuple(texts[row] for row in order) for texts in (self.ids, self.questions))
        columns = tuple(self.columns[row] for row in order) if self.columns else ()
        return replace(self, ids=ids, questions=questions, rates=self.rates[order], columns=columns)

    def pool(self) -> PromptPool:
        """Return the pool that selectors choose from; nothing is generated, so its prompts carry no tokens."""
        columns = self.columns or ({},) * len(self.ids)
        rows = enumerate(zip(self.ids, self.questions, columns, strict=True))
        return PromptPool.of([Prompt(name, index, text, text, (), others) for index, (name, text, others) in rows])


def read_traces(path: Path) -> Traces:
    """Read a JSONL file of `{"question": text, "pass_rate_by_epoch": [rate, ...]}`; other keys are columns of the pool.

    Traces may differ in length; all are cut to the shortest one, since a choice beyond its end would have no outcome.
    Raise UserError that names the line for content that cannot be used.
    """
    if not path.is_file():
        raise UserError(f"--traces is {str(path)!r}, not a file. Give a JSONL file with {QUESTION} and {RATES}.")
    questions, traces, columns = [], [], []
    for where, row in read_objects(path, (QUESTION, RATES)):
        question, rates = row[QUESTION], row[RATES]
        if not isinstance(question, str) or not question.strip():
            raise UserError(f"{where}: {QUESTION} is {question!r}, expected a text. Correct the line.")
        if not isinstance(rates, list) or not rates:
            raise UserError(
                f"{where}: {RATES} is {str(rates)[:40]!r}, expected a list of success rates. Correct the line."
            )
        for visit, rate in enumerate(rates):
            # A comparison, not its opposite: NaN is outside too.
            if isinstance(rate, bool) or not isinstance(rate, int | float) or not 0 <= rate <= 1:
                raise UserError(
                    f"{where}: {RATES}[{visit}] is {rate!r}, expected a success rate in [0, 1]. Correct the line."
                )
        questions.append(question)
        traces.append(rates)
        columns.append({key: value for key, value in row.items() if key not in (QUESTION, RATES)})
    if not questions:
        raise UserError(f"{str(path)!r} is empty, expected {QUESTION} and {RATES} per line. Give another file.")
    shortest = min(map(len, traces))
    table = np.array([rates[:shortest] for rates in traces], dtype=np.float64)
    return Traces(tuple(map(str, range(len(questions)))), tuple(questions), table, columns=tuple(columns))


@dataclass(frozen=True, slots=True)
class Budget:
    """The rollouts of a step.

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
        """Prompts rolled out per step on average, references included."""
        return self.prompts + self.references / self.every

    def within(self, rollouts: int) -> Budget:
        """Return this budget cut to `rollouts` prompts per step, of which references take at most half."""
        references = min(self.references, self.every * (rollouts // 2))
        return Budget(rollouts - -(-references // self.every), references, self.every)


@dataclass(frozen=True, slots=True, eq=False)
class Replay:
    """Choices of a selector at every visit and their quality, float64 `[V]` unless stated otherwise.

    Attributes:
        chosen: int64 `[V, prompts]` pool positions, in the order of the choice.
        informative: share of the chosen prompts with a recorded rate strictly between 0 and 1.
        variance: mean of p (1 - p) over the chosen prompts.
        pearson: correlation of the forecast made before the rollouts with the recorded rates of all `Q` prompts; NaN
            where there was no forecast or it was constant.
        pearson_unmeasured: the same correlation without the prompts of this visit's reference set.
        brier: mean squared error of that forecast over all prompts; NaN where there was none.
        calibration: expected calibration error of the promised P(informative) of all prompts chosen so far, this visit
            included, against the rates shown; NaN before the first promise. A promise is the selector's
            `informative_chance`, or 1 - p^G - (1 - p)^G of its forecast p where it has none.
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
    calibration: np.ndarray
    distinct: np.ndarray
    rollouts: np.ndarray
    seconds: np.ndarray


def revealed(traces: Traces, samples: int, seed: int | None) -> np.ndarray:
    """Return the rates that a selector sees of prompts that it chose, float64 `[Q, V]`.

    They are the recorded `p` without a seed, else a draw of Binomial(G, p) / G with `G` samples, the same for every
    selector.
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
    """Run a new selector through all visits, as a training would, scored against the recorded rates.

    Args:
        selector: not set up yet.
        traces: the recorded run.
        budget: prompts and references of a step; references are drawn only for a selector that uses them.
        context: seed, encoder and cache of the selector.
        shown: float64 `[Q, V]` rates that the selector learns from (`revealed`).
        samples: completions of a group, from which a shown rate comes.
        reveal_all: whether every prompt's outcome is shown after a step, at no cost (the ceiling).

    Raise UserError for a batch larger than the pool, and for a selector that breaks its contract.
    """
    size, visits = traces.rates.shape
    if not 0 < budget.prompts <= size:
        raise UserError(f"--batch is {budget.prompts}, but the pool has {size} prompts. Give 1 to {size}.")
    pool = traces.pool()
    selector.setup(pool, context)

    def observe(positions: np.ndarray, visit: int, source: Source) -> None:
        rates = shown[positions, visit]
        names = [pool.ids[position] for position in positions]
        counts = np.full(len(positions), samples, dtype=np.int64)
        selector.observe(Outcomes(visit, names, rates, counts, source, reward_std=np.sqrt(rates * (1 - rates))))

    used = np.zeros(size, dtype=bool)
    steps, promised, kept = [], list[np.ndarray](), list[np.ndarray]()
    for visit in range(visits):
        started = time.perf_counter()
        measured = np.empty(0, dtype=np.int64)
        if budget.references and visit % budget.every == 0 and selector.uses_references:
            measured = pool.positions(selector.choose_references(budget.references))
            observe(measured, visit, "reference")
        chosen = pool.positions(selector.choose(budget.prompts))
        if len(chosen) != budget.prompts or len(np.unique(chosen)) != budget.prompts:
            raise UserError(
                f"{type(selector).__name__}.choose({budget.prompts}) returned {len(chosen)} prompts, "
                f"{len(np.unique(chosen))} of them distinct, expected {budget.prompts} distinct ones. Correct it."
            )
        # After the choice, as in a run: some selectors advance their belief by a step when they are asked to choose.
        forecast = selector.forecast()
        if forecast is not None:
            if forecast.shape != (size,) or not np.isfinite(forecast).all():
                raise UserError(
                    f"{type(selector).__name__}.forecast() returned shape {forecast.shape} or values that are not "
                    f"finite, expected {size} success rates. Correct it."
                )
            forecast = forecast.copy()  # a selector may continue to work in the array that it returned
        chance = selector.informative_chance()
        if chance is None and forecast is not None:
            chance = informative_probability(forecast, samples)
        if chance is not None:
            promised.append(chance[chosen])
            kept.append(((shown[chosen, visit] > 0) & (shown[chosen, visit] < 1)).astype(np.float64))
        observe(np.arange(size) if reveal_all else chosen, visit, "fresh")
        seconds = time.perf_counter() - started
        used[chosen] = True
        rates = traces.rates[:, visit]
        p = rates[chosen]
        quality = np.nan, np.nan, np.nan
        if forecast is not None:
            others = np.ones(size, dtype=bool)
            others[measured] = False
            quality = pearson(forecast, rates), pearson(forecast[others], rates[others]), brier(forecast, rates)
        informative, variance = float(np.mean((p > 0) & (p < 1))), float(np.mean(p * (1 - p)))
        calibration = reliability(np.concatenate(promised), np.concatenate(kept)).error if promised else np.nan
        rolled_out = len(chosen) + len(measured)
        steps.append((chosen, informative, variance, *quality, calibration, used.mean(), rolled_out, seconds))
    return Replay(*(np.array(column) for column in zip(*steps, strict=True)))
