"""The cost at which a run reached an accuracy, and its ratio to the cost of another run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
import pandas as pd

from app.runs.summary import RunSummary

COSTS = {"time": "seconds", "completions": "completions", "tokens": "completion_tokens", "steps": "step"}
"""Fields of an `Evaluation` by the name of the cost."""

Goal = Literal["final", "best"]
_EQUAL = 1e-9


@dataclass(frozen=True, slots=True, eq=False)
class Course:
    """The evaluations of a run, in order.

    Attributes:
        accuracy: float64 `[E]` on the held-out prompts.
        costs: float64 `[E]` by name of `COSTS`: cost of the training before each evaluation.
    """

    accuracy: np.ndarray
    costs: Mapping[str, np.ndarray]

    @classmethod
    def of(cls, summary: RunSummary) -> Course:
        """Return the evaluations of a run that has at least one."""
        table = pd.DataFrame(list(summary.evaluations)).astype(float)
        return cls(table["accuracy"].to_numpy(), {cost: table[field].to_numpy() for cost, field in COSTS.items()})


@dataclass(frozen=True, slots=True)
class Ratio:
    """Cost of an arm to the goal divided by a cost of the baseline, for one seed.

    An arm that never reached the goal enters with the cost of its whole run, a lower bound. The value is None when the
    baseline began at the goal.
    """

    value: float | None
    reached: bool


def smooth(accuracy: np.ndarray, window: int) -> np.ndarray:
    """Return float64 `[E]`: the trailing mean over `window` evaluations, over fewer at the beginning.

    It only looks back: a run has reached an accuracy when its evaluations show it, not when later ones do.
    """
    ends = range(1, len(accuracy) + 1)
    return np.array([accuracy[max(0, end - window) : end].mean() for end in ends], dtype=float)


def goal_accuracy(course: Course, goal: Goal, window: int) -> float:
    """Return the last ("final") or the highest ("best") smoothed accuracy."""
    smoothed = smooth(course.accuracy, window)
    return float(smoothed[-1] if goal == "final" else smoothed.max())


def cost_to_reach(course: Course, cost: str, target: float, window: int) -> float | None:
    """Return the cost at which the smoothed accuracy first reached the target; None if it never did.

    Cost and smoothed accuracy are interpolated linearly between two evaluations.
    """
    smoothed, costs = smooth(course.accuracy, window), course.costs[cost]
    reached = np.flatnonzero(smoothed >= target - _EQUAL)
    if not len(reached):
        return None
    first = int(reached[0])
    if first == 0:
        return float(costs[0])
    before, after = smoothed[first - 1], smoothed[first]
    share = min(1.0, (target - before) / (after - before))
    return float(costs[first - 1] + share * (costs[first] - costs[first - 1]))


def ratio(arm: Course, baseline: Course, cost: str, goal: Goal, window: int, *, whole_run: bool = False) -> Ratio:
    """Return the cost of an arm to the baseline's goal, relative to the baseline.

    With `whole_run`, it is divided by the cost of the baseline's whole run instead of its cost to the goal. DOTS + RR
    reports this form (arXiv 2506.05316, table 1); it favours the arm when the baseline reached its final accuracy long
    before its end.
    """
    target = goal_accuracy(baseline, goal, window)
    theirs, mine = (cost_to_reach(course, cost, target, window) for course in (baseline, arm))
    if not theirs or mine == 0:  # it began at the goal
        return Ratio(None, False)
    spent = float(arm.costs[cost][-1]) if mine is None else mine
    return Ratio(spent / (float(baseline.costs[cost][-1]) if whole_run else theirs), mine is not None)
