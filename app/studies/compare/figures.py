"""The figures of a comparison, as `compare.json` holds them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from scipy.special import stdtrit

from app.studies.compare.reach import Goal, Ratio, goal_accuracy, ratio, smooth
from app.studies.compare.records import Comparison, Record
from datamodules.errors import UserError
from datamodules.ledger import PHASES
from datamodules.types import REWARD_TOLERANCE

RATIOS = {"time": "time_ratio", "completions": "completion_ratio", "tokens": "token_ratio", "steps": "step_ratio"}
"""Names of the ratios in `compare.json` by cost."""

_REACH = (
    "An arm reaches the goal where {accuracy} first equals it, with cost and accuracy interpolated linearly between "
    "two evaluations; the same rule applies to the baseline, seed by seed. Means of ratios are geometric, with "
    "intervals on logarithms. A seed that never reaches the goal enters with the cost of its whole run, which makes "
    "the mean a lower bound (>=) without an interval. "
)
_METHOD = (
    "95% intervals are Student's t over seeds; those of accuracies end at 0 and 1. Time is the training clock: "
    "selection, rollouts (reference sets and discarded groups included), scoring and updates, without validation, "
    "checkpoints and start-up."
)
_COLUMNS = ["step", "prompt_id", "source", "correctness", "completion_tokens"]

Figures = dict[str, Any]


def summarise(comparison: Comparison) -> Figures:
    """Return all figures: `{"setting": ..., "arms": {NAME: {"time_ratio": {"mean", "ci95"}, ...}}}`."""
    request = comparison.request
    last = f"the mean of its last {request.window} evaluations (fewer at the beginning)"
    accuracy = "its accuracy" if request.window == 1 else last
    machines = [dict(record.machine) for record in comparison.records]
    baseline = comparison.of(request.baseline)
    shares = {record.seed: informative_token_share(record.version) for record in baseline}
    known = {seed: share for seed, share in shares.items() if share is not None}
    # Perfect choice rolls out informative groups alone. Assumed: choosing is free, a token costs the same in every
    # rollout, and a group teaches the same in any batch. A method that finds other informative groups may do better.
    rolled = {one.seed: one.summary.seconds["rollout"] + one.summary.seconds["environment"] for one in baseline}
    times = {
        one.seed: 1.0 - rolled[one.seed] / one.summary.training_seconds * (1.0 - known[one.seed])
        for one in baseline
        if one.seed in known
    }
    return {
        "setting": {
            "base": list(request.base),
            "arms": {arm.name: list(arm.configs) for arm in request.arms},
            "differences": {name: list(lines) for name, lines in comparison.differences.items()},
            "seeds": list(request.seeds),
            "baseline": request.baseline,
            "budget": str(request.budget),
            "smoothing_window": request.window,
            "method": ("" if len(request.arms) == 1 else _REACH.format(accuracy=accuracy)) + _METHOD,
            "machines": [one for place, one in enumerate(machines) if one not in machines[:place]],
            "missing": list(comparison.missing),
        },
        "perfect_choice": {"informative_tokens": _over_seeds(known), "time_ratio": _over_seeds(times)},
        "arms": {arm.name: _arm(comparison, records) for arm in request.arms if (records := comparison.of(arm.name))},
    }


def _arm(comparison: Comparison, records: Sequence[Record]) -> Figures:
    window = comparison.request.window
    bases = {base.seed: base for base in comparison.of(comparison.request.baseline)}
    pairs = [(record, bases[record.seed]) for record in records if record.seed in bases]
    smoothed = {record.seed: smooth(record.course.accuracy, window) for record in records}
    goals = {r.seed: goal_accuracy(base.course, "final", window) for r, base in pairs}

    def ratios(goal: Goal, whole_run: bool = False) -> Figures:
        def of(cost: str) -> dict[int, Ratio]:
            return {r.seed: ratio(r.course, base.course, cost, goal, window, whole_run=whole_run) for r, base in pairs}

        return {name: ratio_figures(of(cost)) for cost, name in RATIOS.items()}

    def over_steps(name: str) -> Figures:
        return _over_seeds({r.seed: float(np.mean(r.curves[name][1])) for r in records if name in r.curves})

    def mean(values: Sequence[float]) -> float:
        return float(np.mean(values))

    summaries = [record.summary for record in records]
    return {
        "runs": len(records),
        **ratios("final"),
        "to_best": ratios("best"),
        "share_of_baseline_run": ratios("final", whole_run=True),
        "goal": _over_seeds(goals),
        "final_accuracy": _over_seeds({seed: float(accuracy[-1]) for seed, accuracy in smoothed.items()}, 0, 1),
        "best_accuracy": _over_seeds({seed: float(accuracy.max()) for seed, accuracy in smoothed.items()}, 0, 1),
        "accuracy_gain": _over_seeds({seed: float(smoothed[seed][-1]) - goal for seed, goal in goals.items()}, -1, 1),
        "informative_fraction": _over_seeds({r.seed: float(r.summary.informative_fraction) for r in records}),
        "fresh_informative_fraction": over_steps("selection/fresh_informative_fraction"),
        "forecast_pearson": over_steps("selection/forecast_pearson"),
        "forecast_brier": over_steps("selection/forecast_brier"),
        "seconds": {"training": mean([one.training_seconds for one in summaries])}
        | {phase: mean([one.seconds[phase] for one in summaries]) for phase in PHASES},
        "totals": {
            "steps": mean([one.steps for one in summaries]),
            "completions": mean([one.evaluations[-1].completions for one in summaries]),
            "completion_tokens": mean([one.evaluations[-1].completion_tokens for one in summaries]),
            "reference_completions": mean([one.reference.completions for one in summaries]),
            "discarded_completions": mean([one.discarded.completions for one in summaries]),
            "replayed_groups": mean([one.replayed_groups for one in summaries]),
        },
    }


def ratio_figures(ratios: Mapping[int, Ratio]) -> Figures:
    """Return the geometric mean of ratios over seeds with its 95% interval (Student's t on the logarithms).

    With a seed that never reached the goal (`censored`) the mean is a lower bound (`at_least`) and has no interval.
    Seeds whose baseline began at the goal (`undefined`) are left out of it.
    """
    values = [one.value for one in ratios.values() if one.value is not None]
    reached = sum(one.reached for one in ratios.values())
    interval = geometric_interval(values)
    return _interval(Interval(interval.mean) if reached < len(values) else interval) | {
        "at_least": reached < len(values),
        "reached": reached,
        "censored": len(values) - reached,
        "undefined": len(ratios) - len(values),
        "per_seed": {str(seed): {"ratio": one.value, "reached": one.reached} for seed, one in ratios.items()},
    }


def informative_token_share(version: Path) -> float | None:
    """Return the share of rolled-out tokens that were in groups with differing correctness rewards.

    Only steps whose completions were written (`callbacks.CompletionsLog`) count; replayed groups are left out. Return
    None when none were written. Raise UserError for an unreadable file.
    """
    tokens, informative = 0.0, 0.0
    for file in sorted((version / "completions").glob("step_*.parquet")):
        try:
            table = pq.read_table(file, columns=_COLUMNS).to_pandas()
        except (pa.ArrowException, OSError) as error:
            raise UserError(
                f"{str(file)!r} is unreadable ({str(error).splitlines()[0]}), expected completions with "
                f"{', '.join(_COLUMNS)}. Remove it to rebuild the report without it."
            ) from None
        groups = table[table["source"] != "replay"].groupby(["step", "prompt_id"])
        spread = groups["correctness"].max() - groups["correctness"].min()
        sums = groups["completion_tokens"].sum()
        tokens += float(sums.sum())
        informative += float(sums[spread > REWARD_TOLERANCE].sum())
    return informative / tokens if tokens else None


def _over_seeds(values: Mapping[int, float], lowest: float = -math.inf, highest: float = math.inf) -> Figures:
    """Return mean, interval and values; the interval is cut to the values that are possible."""
    per_seed = {str(seed): value for seed, value in values.items()}
    found = _interval(mean_interval(list(values.values())))
    if found["ci95"]:
        found["ci95"] = [min(max(bound, lowest), highest) for bound in found["ci95"]]
    return found | {"per_seed": per_seed}


def _interval(interval: Interval) -> Figures:
    return {"mean": interval.mean, "ci95": None if interval.low is None else [interval.low, interval.high]}


@dataclass(frozen=True, slots=True)
class Interval:
    """A mean, None without values, and its confidence interval, None with fewer than two."""

    mean: float | None
    low: float | None = None
    high: float | None = None


def mean_interval(values: Sequence[float]) -> Interval:
    """Return the arithmetic mean with Student's t interval: mean +- t s / sqrt(n), `n - 1` degrees of freedom."""
    count, mean = len(values), float(np.mean(values)) if values else None
    if mean is None or count == 1:
        return Interval(mean)
    half = student_t(count - 1) * float(np.std(values, ddof=1)) / math.sqrt(count)
    return Interval(mean, mean - half, mean + half)


def geometric_interval(values: Sequence[float]) -> Interval:
    """Return the geometric mean of ratios above 0, with Student's t interval of their logarithms.

    Ratios of 1/2 and 2 cancel out, and the interval of `a / b` is the inverse of that of `b / a`.
    """
    logs = mean_interval([math.log(value) for value in values])
    return Interval(*(None if bound is None else math.exp(bound) for bound in (logs.mean, logs.low, logs.high)))


def student_t(dof: int, confidence: float = 0.95) -> float:
    """Return the t that bounds the middle `confidence` of Student's distribution with `dof` >= 1 degrees of freedom."""
    return float(stdtrit(dof, (1 + confidence) / 2))
