"""The figures of a comparison: what `compare.json` holds."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from app.studies.compare.ceiling import informative_token_share, perfect_choice
from app.studies.compare.reach import (
    COSTS,
    Course,
    Goal,
    Ratio,
    goal_accuracy,
    ratio,
    share_of_run,
    smooth,
    summarise_ratios,
)
from app.studies.compare.records import Comparison, Record
from app.studies.intervals import Interval, mean_interval
from datamodules.ledger import PHASES

RATIOS = {"time": "time_ratio", "completions": "completion_ratio", "tokens": "token_ratio", "steps": "step_ratio"}
"""Names of the ratios in `compare.json`, by what is counted."""

METHOD = (
    "An arm has reached the goal where {accuracy} is "
    "first at the goal, with cost and accuracy in proportion between two evaluations; the baseline is counted by the "
    "same rule, seed by seed. Means of ratios are geometric; 95% intervals are Student's t over seeds, on logarithms "
    "for ratios. A seed that never reached the goal enters by its cost in the end, which makes the mean a lower bound "
    "(>=) without an interval. Time is the training clock: choosing, rollouts (reference sets and discarded groups "
    "included), scoring and updates, without validation, checkpoints and start-up."
)

Figures = dict[str, Any]
_Rule = Callable[[Course, Course, str, Goal, int], Ratio]


def summarise(comparison: Comparison) -> Figures:
    """All figures, as JSON holds them: `{"setting": ..., "arms": {NAME: {"time_ratio": {"mean", "ci95"}, ...}}}`."""
    baseline = comparison.of(comparison.request.baseline)
    return {
        "setting": _setting(comparison),
        "perfect_choice": _perfect_choice(baseline),
        "arms": {
            arm.name: _arm(comparison, comparison.of(arm.name))
            for arm in comparison.request.arms
            if comparison.of(arm.name)
        },
    }


def _perfect_choice(baseline: Sequence[Record]) -> Figures:
    """By what is counted; runs that kept no completions are left out."""
    shares = {record.seed: informative_token_share(record.folder) for record in baseline}
    known = {seed: share for seed, share in shares.items() if share is not None}
    times = {
        record.seed: perfect_choice(record.account, known[record.seed]) for record in baseline if record.seed in known
    }
    return {"informative_tokens": _over_seeds(known), "time_ratio": _over_seeds(times)}


def write_json(path: Path, figures: Figures) -> None:
    """Writes the figures."""
    path.write_text(json.dumps(figures, indent=2, allow_nan=False) + "\n", encoding="utf-8")


def _setting(comparison: Comparison) -> Figures:
    request = comparison.request
    machines = [dict(record.machine) for record in comparison.records]
    return {
        "base": list(request.base),
        "arms": {arm.name: list(arm.configs) for arm in request.arms},
        "differences": {name: list(lines) for name, lines in comparison.differences.items()},
        "seeds": list(request.seeds),
        "baseline": request.baseline,
        "budget": str(request.budget),
        "smoothing_window": request.window,
        "method": METHOD.format(accuracy=_accuracy(request.window)),
        "machines": [one for place, one in enumerate(machines) if one not in machines[:place]],
        "missing": list(comparison.missing),
    }


def _accuracy(window: int) -> str:
    return "its accuracy" if window == 1 else f"the mean of its last {window} evaluations (fewer at the beginning)"


def _arm(comparison: Comparison, records: Sequence[Record]) -> Figures:
    window = comparison.request.window
    pairs = [(record, base) for record in records if (base := comparison.baseline_of(record)) is not None]

    def ratios(goal: Goal, rule: _Rule) -> Figures:
        return {
            RATIOS[cost]: _ratio({r.seed: rule(r.course, b.course, cost, goal, window) for r, b in pairs})
            for cost in COSTS
        }

    def ended(record: Record) -> float:
        return float(smooth(record.course.accuracy, window)[-1])

    gains = {record.seed: ended(record) - ended(base) for record, base in pairs}
    return {
        "runs": len(records),
        **ratios("final", ratio),
        "to_best": ratios("best", ratio),
        "share_of_baseline_run": ratios("final", share_of_run),
        "goal": _over_seeds({r.seed: goal_accuracy(b.course, "final", window) for r, b in pairs}),
        "final_accuracy": _over_seeds({record.seed: ended(record) for record in records}),
        "best_accuracy": _over_seeds({r.seed: float(smooth(r.course.accuracy, window).max()) for r in records}),
        "accuracy_gain": _over_seeds(gains),
        "informative_fraction": _over_seeds({r.seed: float(r.account["informative_fraction"]) for r in records}),
        "fresh_informative_fraction": _over_curves(records, "selection/fresh_informative_fraction"),
        "forecast_pearson": _over_curves(records, "selection/forecast_pearson"),
        "forecast_brier": _over_curves(records, "selection/forecast_brier"),
        "seconds": _seconds(records),
        "totals": _totals(records),
    }


def _ratio(ratios: Mapping[int, Ratio]) -> Figures:
    found = summarise_ratios(list(ratios.values()))
    return _interval(found.interval) | {
        "at_least": found.at_least,
        "reached": found.reached,
        "censored": found.censored,
        "undefined": found.undefined,
        "per_seed": {str(seed): {"ratio": one.value, "reached": one.reached} for seed, one in ratios.items()},
    }


def _over_seeds(values: Mapping[int, float]) -> Figures:
    per_seed = {str(seed): value for seed, value in values.items()}
    return _interval(mean_interval(list(values.values()))) | {"per_seed": per_seed}


def _over_curves(records: Sequence[Record], name: str) -> Figures:
    """Of each run the mean over the steps that logged a metric."""
    return _over_seeds({r.seed: float(np.mean(r.curves[name][1])) for r in records if name in r.curves})


def _interval(interval: Interval) -> Figures:
    bounds = None if interval.low is None else [interval.low, interval.high]
    return {"mean": interval.mean, "ci95": bounds}


def _seconds(records: Sequence[Record]) -> dict[str, float]:
    """Mean over runs: the training clock, what of it the phases took, and what lies outside of it."""
    found = {"training": _mean([record.account["training_seconds"] for record in records])}
    return found | {phase: _mean([r.account["seconds"][phase] for r in records]) for phase in PHASES}


def _totals(records: Sequence[Record]) -> dict[str, float]:
    """Mean over runs of what they did in all; completions and tokens are those rolled out for training."""
    last = [record.account["evaluations"][-1] for record in records]
    return {
        "steps": _mean([record.account["steps"] for record in records]),
        "completions": _mean([one["completions"] for one in last]),
        "completion_tokens": _mean([one["completion_tokens"] for one in last]),
        "reference_completions": _mean([record.account["reference"]["completions"] for record in records]),
        "discarded_completions": _mean([record.account["discarded"]["completions"] for record in records]),
        "replayed_groups": _mean([record.account["replayed_groups"] for record in records]),
    }


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values))
