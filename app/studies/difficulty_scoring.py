"""How well difficulty forecasts met recorded outcomes of questions that they were not learnt from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from app.reporting.forecast_quality import brier, pearson, reliability, spearman
from app.studies.difficulty_forecasters import Forecaster
from datamodules.difficulty.outcomes import RecordedOutcomes
from datamodules.seeding import generator

FEWEST = 8
"""Tested questions that a visit must have measured for a correlation over them."""


@dataclass(frozen=True, slots=True, eq=False)
class Scored:
    """Forecasts of one method for one set of tested questions, over all visits.

    Attributes:
        forecast: float64 `[N]`, one for each tested question and visit that measured it.
        measured: float64 `[N]`.
        pearson: mean over visits of the correlation within a visit, by their number of tested questions: knowing that
            the policy improves from visit to visit earns nothing.
        spearman: the same of ranks.
    """

    forecast: np.ndarray
    measured: np.ndarray
    pearson: float
    spearman: float

    @property
    def figures(self) -> dict[str, float]:
        """Pearson, Spearman, Brier and expected calibration error, by the names that the report gives them."""
        return {
            "pearson": self.pearson,
            "spearman": self.spearman,
            "brier": brier(self.forecast, self.measured),
            "ece": reliability(self.forecast, self.measured).error,
        }


def score(
    forecaster: Forecaster,
    outcomes: RecordedOutcomes,
    tested: np.ndarray,
    candidates: np.ndarray,
    references: int,
    seed: int,
) -> Scored:
    """Forecasts the tested questions at every visit from references that the same visit measured.

    Args:
        forecaster: gives success rates of all questions from rows and rates of references.
        outcomes: of all questions.
        tested: int64 rows that are scored, unless drawn as references.
        candidates: int64 rows that references are drawn from, anew at every visit, by `seed` and visit alone.
        references: how many; at most half of the tested ones where they are drawn from these.
        seed: of the draw.
    """
    parts = []
    own = len(np.intersect1d(tested, candidates)) > 0
    for visit in range(outcomes.rates.shape[1]):
        rates = outcomes.rates[:, visit].astype(np.float64)
        known = candidates[np.isfinite(rates[candidates])]
        count = min(references, len(known) // 2 if own else len(known))
        drawn = generator(seed, "difficulty references", visit).permutation(known)[:count]
        rest = np.setdiff1d(tested[np.isfinite(rates[tested])], drawn)
        if len(drawn) >= 2 and len(rest) >= FEWEST:
            parts.append((forecaster(drawn, rates[drawn])[rest], rates[rest]))
    if not parts:
        return Scored(np.empty(0), np.empty(0), float("nan"), float("nan"))
    return Scored(
        np.concatenate([forecast for forecast, _ in parts]),
        np.concatenate([measured for _, measured in parts]),
        _mean([pearson(*part) for part in parts], [len(part[0]) for part in parts]),
        _mean([spearman(*part) for part in parts], [len(part[0]) for part in parts]),
    )


def _mean(values: Sequence[float], weights: Sequence[int]) -> float:
    """The weighted mean of those that are defined; NaN for none (a constant forecast correlates with nothing)."""
    found = np.isfinite(values)
    return float(np.average(np.array(values)[found], weights=np.array(weights)[found])) if found.any() else float("nan")
