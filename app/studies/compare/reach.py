"""When a run reached an accuracy, and what that cost beside another run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from app.studies.intervals import Interval, geometric_interval

COSTS = ("time", "completions", "tokens", "steps")
"""What reaching an accuracy is counted in: seconds of the training clock; completions and their tokens rolled out for
training, reference sets and discarded groups included; training steps (batches)."""

Goal = Literal["final", "best"]
_EQUAL = 1e-9


@dataclass(frozen=True, slots=True, eq=False)
class Course:
    """The evaluations of a run, in order.

    Attributes:
        accuracy: float64 `[E]` on the held-out prompts.
        costs: float64 `[E]` by name of `COSTS`: what training had cost by then.
    """

    accuracy: np.ndarray
    costs: Mapping[str, np.ndarray]


@dataclass(frozen=True, slots=True)
class Ratio:
    """What an arm needed to reach the goal over what the baseline needed, one seed.

    Attributes:
        value: the ratio; where the arm never reached the goal, what its whole run cost over what the baseline needed,
            so that the true one is larger; None where the baseline itself had nothing to reach.
        reached: whether the arm reached it.
    """

    value: float | None
    reached: bool


@dataclass(frozen=True, slots=True)
class RatioSummary:
    """Ratios of several seeds.

    Attributes:
        interval: geometric mean and 95% interval (Student's t on the logarithms). With a seed that never reached the
            goal the mean is too low, since that seed enters by its lower bound, and there is no interval.
        reached: seeds that reached the goal.
        censored: seeds that did not.
        undefined: seeds whose baseline had nothing to reach; they enter nothing else.
    """

    interval: Interval
    reached: int
    censored: int
    undefined: int

    @property
    def at_least(self) -> bool:
        """Whether the mean is a lower bound."""
        return self.censored > 0


def smooth(accuracy: np.ndarray, window: int) -> np.ndarray:
    """float64 `[E]`: mean of each evaluation and the `window - 1` before it, of those there are at the beginning.

    It looks back only: a run has reached an accuracy when the evaluations show it, not when later ones do.
    """
    ends = range(1, len(accuracy) + 1)
    return np.array([accuracy[max(0, end - window) : end].mean() for end in ends], dtype=float)


def goal_accuracy(course: Course, goal: Goal, window: int) -> float:
    """The smoothed accuracy that the baseline ended with ("final") or its highest ("best")."""
    smoothed = smooth(course.accuracy, window)
    return float(smoothed[-1] if goal == "final" else smoothed.max())


def cost_to_reach(course: Course, name: str, target: float, window: int) -> float | None:
    """What a run had cost when its smoothed accuracy first was at the target; None when it never was.

    Between two evaluations cost and smoothed accuracy are taken to grow in proportion.
    """
    smoothed, costs = smooth(course.accuracy, window), course.costs[name]
    there = np.flatnonzero(smoothed >= target - _EQUAL)
    if not len(there):
        return None
    first = int(there[0])
    if first == 0:
        return float(costs[0])
    before, after = smoothed[first - 1], smoothed[first]
    share = min(1.0, (target - before) / (after - before))
    return float(costs[first - 1] + share * (costs[first] - costs[first - 1]))


def ratio(arm: Course, baseline: Course, name: str, goal: Goal, window: int) -> Ratio:
    """The cost of an arm over that of the baseline, both counted to the baseline's goal by the same rule."""
    target = goal_accuracy(baseline, goal, window)
    theirs, mine = (cost_to_reach(course, name, target, window) for course in (baseline, arm))
    if not theirs or mine == 0:  # they began there
        return Ratio(None, False)
    return Ratio(float(arm.costs[name][-1]) / theirs, False) if mine is None else Ratio(mine / theirs, True)


def share_of_run(arm: Course, baseline: Course, name: str, goal: Goal, window: int) -> Ratio:
    """The cost of an arm to the baseline's goal over the cost of the baseline's whole run.

    The form in which DOTS + RR reports its savings (arXiv 2506.05316, table 1). It flatters an arm beside a baseline
    that had reached its final accuracy long before its end.
    """
    target = goal_accuracy(baseline, goal, window)
    theirs, mine = (cost_to_reach(course, name, target, window) for course in (baseline, arm))
    if not theirs or mine == 0:
        return Ratio(None, False)
    whole = float(baseline.costs[name][-1])
    return Ratio((float(arm.costs[name][-1]) if mine is None else mine) / whole, mine is not None)


def summarise_ratios(ratios: Sequence[Ratio]) -> RatioSummary:
    """Over seeds; nothing is left out without being counted."""
    values = [one.value for one in ratios if one.value is not None]
    censored = sum(not one.reached for one in ratios if one.value is not None)
    found = geometric_interval(values)
    interval = Interval(found.mean) if censored else found
    return RatioSummary(interval, len(values) - censored, censored, len(ratios) - len(values))
