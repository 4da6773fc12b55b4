"""Which curves of a comparison are drawn, against what."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from app.studies.compare.reach import COSTS, smooth
from app.studies.compare.records import Comparison, Record
from app.studies.compare.svg import Chart, Line, bar_chart, line_chart

AXES = {
    "time": "training clock, s",
    "completions": "completions rolled out",
    "tokens": "completion tokens rolled out",
    "steps": "training steps",
}
INFORMATIVE = {
    "rolled out": "selection/fresh_informative_fraction",
    "trained on (replayed ones too)": "selection/informative_fraction",
}
FORECAST = {
    "Brier score of the choice": "selection/forecast_brier",
    "Pearson of the choice": "selection/forecast_pearson",
    "Pearson, uniform references": "difficulty/reference_pearson",
}
PHASES = ("select", "rollout", "reference", "reward", "update", "sync")
_POINTS = 81
"""Of a mean curve."""
_WINDOWS = 25
"""Parts of a run over which a metric of single steps is averaged."""

Curve = tuple[np.ndarray, np.ndarray]


def accuracy_charts(comparison: Comparison, goal: float | None) -> dict[str, str]:
    """Accuracy against each cost: faint, every evaluation of every seed; bold, the smoothed mean over seeds."""
    window = comparison.request.window
    level = None if goal is None else (goal, f"final accuracy of {comparison.request.baseline}")
    found = {}
    for cost in COSTS:

        def raw(record: Record, cost: str = cost) -> Curve:
            return record.course.costs[cost], record.course.accuracy

        def smoothed(record: Record, cost: str = cost) -> Curve:
            return record.course.costs[cost], smooth(record.course.accuracy, window)

        lines = [*_seed_lines(comparison, raw), *_mean_lines(comparison, smoothed)]
        found[cost] = line_chart(Chart(AXES[cost], "accuracy on held-out prompts", lines, level))
    return found


def metric_charts(comparison: Comparison, metrics: Mapping[str, str], height: str | None = None) -> dict[str, str]:
    """Metrics of single steps against the steps, averaged over a part of the run and over seeds.

    Args:
        comparison: what is finished.
        metrics: names of metrics by the charts' labels.
        height: label of the vertical axis; None for the chart's own.
    """
    found = {}
    for label, name in metrics.items():

        def averaged(record: Record, name: str = name) -> Curve:
            steps, values = record.curves.get(name, ([], []))
            return np.array(steps, dtype=float), smooth(np.array(values, dtype=float), -(-len(values) // _WINDOWS) or 1)

        found[label] = line_chart(Chart(AXES["steps"], height or label, _mean_lines(comparison, averaged)))
    return found


def phase_charts(arms: Mapping[str, Any]) -> dict[str, str]:
    """Seconds by phase, of whole runs and of a step; what the phases leave of the training clock is "other"."""
    styles = {name: f"part-{place}" for place, name in enumerate((*PHASES, "other"))}
    whole = {name: _parts(arm["seconds"]) for name, arm in arms.items()}
    step = {
        name: {part: value / max(1.0, arms[name]["totals"]["steps"]) for part, value in parts.items()}
        for name, parts in whole.items()
    }
    return {"of a step": bar_chart(step, styles, "s"), "of a run": bar_chart(whole, styles, "s")}


def mean_curve(curves: Sequence[Curve]) -> Curve:
    """Mean of several curves over the stretch that all of them cover, linear between their points."""
    curves = [curve for curve in curves if len(curve[0])]
    if not curves:
        return np.empty(0), np.empty(0)
    low, high = max(float(x[0]) for x, _ in curves), min(float(x[-1]) for x, _ in curves)
    if high < low:
        return np.empty(0), np.empty(0)
    grid = np.linspace(low, high, _POINTS)
    return grid, np.mean([np.interp(grid, x, y) for x, y in curves], axis=0)


def _parts(seconds: Mapping[str, float]) -> dict[str, float]:
    parts = {name: seconds[name] for name in PHASES}
    return parts | {"other": max(0.0, seconds["training"] - sum(parts.values()))}


def _seed_lines(comparison: Comparison, curve: Callable[[Record], Curve]) -> list[Line]:
    place = {arm.name: number for number, arm in enumerate(comparison.request.arms)}
    return [
        Line(*curve(record), f"arm-{place[record.arm]} seed", f"{record.arm} seed {record.seed}", dots=True)
        for record in comparison.records
    ]


def _mean_lines(comparison: Comparison, curve: Callable[[Record], Curve]) -> list[Line]:
    found = []
    for place, arm in enumerate(comparison.request.arms):
        x, y = mean_curve([curve(record) for record in comparison.of(arm.name)])
        found.append(Line(x, y, f"arm-{place} mean", arm.name))
    return found
