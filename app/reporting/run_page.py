"""A run as one HTML file, made from the files in its folder."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import yaml

from app.reporting.completions import cut
from app.reporting.curves import curves_figure, read_scalars
from app.reporting.html import SVG_STYLE, render, svg_of
from app.reporting.pictures import reliability_figure
from app.reporting.validation import CORRECT
from app.rewards.answers import whole_text
from app.runs.record import Curve
from app.runs.summary import SUMMARY, RunSummary
from datamodules.errors import UserError
from datamodules.ledger import PHASES
from datamodules.types import REWARD_TOLERANCE

PROMPTS = "prompts.parquet"
REPORT = "report.html"
_POINTS = 300  # of a curve; a longer one is averaged over windows
_FILES = 20  # the newest files of completions are read
_LISTED = 6  # hardest and easiest prompts
_TASKS = 20
_CONFIG_CHARACTERS = 100_000
_COLUMNS = (
    "step", "prompt_id", "task", "question", "answer", "forecast", "source", "completion", "correctness", "reward",
    "turns",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class _Prompt:
    """A prompt of the lists of hardest and easiest ones; numbers are formatted."""

    task: str
    shown: str  # beginning and end of the question
    question: str
    answer: str
    success: str
    measured: int
    forecast: str
    completion: str | None
    right: bool
    reward: str
    step: int


def write_report(folder: Path) -> Path:
    """Write `report.html` in the folder of a run and return it.

    What the folder lacks, as that of a run of an earlier version or one that was killed, is left out.

    Raises:
        UserError: the folder has no metrics.
    """
    curves = read_scalars(folder) if folder.is_dir() else {}
    if not curves:
        raise UserError(
            f"{folder} has no metrics of a run, expected the folder of a training run, such as runs/NAME/version_0. "
            "Give one of these."
        )
    summary, completions = _summary(folder), _completions(folder)
    prompts = _prompts(folder, completions)
    config = folder / "config.yaml"
    text = config.read_text(encoding="utf-8") if config.exists() else ""
    with matplotlib.rc_context(SVG_STYLE):
        charts = {"curves": svg_of(curves_figure({name: _thinned(curve) for name, curve in curves.items()}), "curves")}
        forecast, measured = _forecasts(completions)
        if len(forecast):
            charts["reliability"] = svg_of(reliability_figure(forecast, measured, ""), "reliability")
    page = render(
        Path(__file__).with_name("report.html.jinja"),
        name=f"{folder.resolve().parent.name} / {folder.name}",
        facts=_facts(text),
        cards=_cards(summary, curves),
        charts=charts,
        phases=_phases(summary),
        tasks=_tasks(prompts),
        outcomes=_outcomes(prompts),
        lists={
            "Hardest prompts": _listed(prompts, completions, hardest=True),
            "Easiest prompts": _listed(prompts, completions, hardest=False),
        },
        config=text[:_CONFIG_CHARACTERS],
    )
    file = folder / REPORT
    file.write_text(page, encoding="utf-8", errors="replace")
    return file


def _summary(folder: Path) -> RunSummary | None:
    try:
        return RunSummary.read(folder / SUMMARY)
    except (OSError, UserError):
        return None


def _completions(folder: Path) -> pd.DataFrame:
    """Return the newest completions of training steps, the newest first."""
    files = sorted((folder / "completions").glob("step_*.parquet"), reverse=True)[:_FILES]
    parts = []
    for file in files:
        known = pq.read_schema(file).names
        parts.append(pq.read_table(file, columns=[name for name in _COLUMNS if name in known]).to_pandas())
    return pd.concat(parts, ignore_index=True).reindex(columns=_COLUMNS) if parts else pd.DataFrame(columns=_COLUMNS)


def _prompts(folder: Path, completions: pd.DataFrame) -> pd.DataFrame:
    """Return the table of prompts; without one, as in an earlier version's run, that of the completions."""
    if (folder / PROMPTS).exists():
        return pq.read_table(folder / PROMPTS).to_pandas()
    groups = completions.groupby("prompt_id", sort=False)
    found = groups[["task", "question", "answer", "forecast"]].first()
    found["mean_success"] = groups["correctness"].mean().astype(float)
    found["times_measured"] = found["times_chosen"] = groups["step"].nunique()
    return found.reset_index()


def _forecasts(completions: pd.DataFrame) -> tuple[np.ndarray, np.ndarray]:
    """Return forecast and measured success rate of the groups that were rolled out for their step, float64 `[N]`."""
    fresh = completions[(completions["source"] == "fresh") & completions["forecast"].notna()]
    groups = fresh.groupby(["step", "prompt_id"])[["forecast", "correctness"]].mean()
    return groups["forecast"].to_numpy(dtype=np.float64), groups["correctness"].to_numpy(dtype=np.float64)


def _thinned(curve: Curve) -> Curve:
    steps, values = curve
    size = -(-len(steps) // _POINTS)
    if size <= 1:
        return curve
    windows = range(0, len(steps), size)
    return [steps[at] for at in windows], [float(np.mean(values[at : at + size])) for at in windows]


def _facts(config: str) -> dict[str, str]:
    """Return what tells runs apart: policy, selector, data, seed."""
    content = yaml.safe_load(config) if config else {}

    def at(*path: str) -> Any:
        value: Any = content
        for name in path:
            value = value.get(name) if isinstance(value, Mapping) else None
        return value

    selector = at("data", "init_args", "selector", "class_path") or "Uniform"
    source = at("data", "init_args", "train", "class_path") or ""
    found = {
        "policy": at("model", "init_args", "policy", "path"),
        "selector": str(selector).rpartition(".")[2],
        "data": at("data", "init_args", "train", "init_args", "path") or str(source).rpartition(".")[2] or None,
        "seed": at("seed_everything"),
    }
    return {name: str(value) for name, value in found.items() if value is not None} if content else {}


def _cards(summary: RunSummary | None, curves: Mapping[str, Curve]) -> dict[str, tuple[str, str]]:
    """Return value and remark by name."""
    found: dict[str, tuple[str, str]] = {}
    if summary is None:
        return {"steps": (f"{max(steps[-1] for steps, _ in curves.values()) + 1:,}", "the run did not end in order")}
    if summary.val:
        first, best, last = (summary.val[name] for name in ("first", "best", "last"))
        found["accuracy"] = (f"{last:.1%}", f"{first:.1%} at the start, best {best:.1%}")
    found["steps"] = (f"{summary.steps:,}", "" if summary.completed else "the run did not end as configured")
    found["informative groups"] = (f"{summary.informative_fraction:.0%}", "of those trained on, mean over steps")
    found["completions"] = (f"{summary.completions:,}", f"{summary.completion_tokens:,} tokens")
    found["training"] = (_duration(summary.training_seconds), f"{_duration(summary.seconds['total'])} in all")
    return found


def _phases(summary: RunSummary | None) -> list[tuple[str, float, float, float]]:
    """Return name, seconds, seconds per step and share of all phases' seconds, of each phase that took time."""
    if summary is None:
        return []
    seconds = {name: summary.seconds[name] for name in PHASES if summary.seconds[name]}
    whole = sum(seconds.values())
    return [(name, one, one / max(1, summary.steps), one / whole) for name, one in seconds.items()]


def _tasks(prompts: pd.DataFrame) -> list[dict[str, str]]:
    """Return a row per part of the data, the largest first: its share of the pool and of the choices, its outcomes."""
    table = prompts.assign(task=prompts["task"].fillna("-").astype(str), mixed=_mixed(prompts))
    groups = table.groupby("task")
    found = pd.DataFrame(
        {
            "prompts": groups.size(),
            "chosen": groups["times_chosen"].sum(),
            "success": groups["mean_success"].mean().astype(float),
            "mixed": groups["mixed"].mean().astype(float),
            "forecast": groups["forecast"].mean().astype(float),
        }
    ).sort_values("prompts", ascending=False)
    chosen = max(1, int(found["chosen"].sum()))
    return [
        {
            "task": str(row.Index),
            "prompts": f"{row.prompts:,}",
            "share of the pool": f"{row.prompts / len(table):.0%}",
            "share of the choices": f"{row.chosen / chosen:.0%}",
            "mean success": _rate(row.success),
            "sometimes right": _rate(row.mixed),
            "forecast now": _rate(row.forecast),
        }
        for row in found.head(_TASKS).itertuples()
    ]


def _outcomes(prompts: pd.DataFrame) -> list[tuple[str, int, float]]:
    """Return name, number and share of the prompts by what was measured of them."""
    success, mixed = prompts["mean_success"].astype(float), _mixed(prompts)
    found = {
        "never measured": int(success.isna().sum()),
        "always wrong": int((success <= REWARD_TOLERANCE).sum()),
        "sometimes right": int((mixed == 1).sum()),
        "always right": int((success >= 1 - REWARD_TOLERANCE).sum()),
    }
    return [(name, count, count / max(1, len(prompts))) for name, count in found.items()]


def _mixed(prompts: pd.DataFrame) -> pd.Series:
    """Return 1 for prompts that were right sometimes, 0 for other measured ones, NaN for the rest."""
    success = prompts["mean_success"].astype(float)
    between = (success > REWARD_TOLERANCE) & (success < 1 - REWARD_TOLERANCE)
    return between.astype(float).where(success.notna())


def _listed(prompts: pd.DataFrame, completions: pd.DataFrame, *, hardest: bool) -> list[_Prompt]:
    """Return the prompts with the lowest or highest mean success.

    Of equal ones those with a written completion come first, and then those that were measured more often.
    """
    measured = prompts[prompts["times_measured"] > 0]
    measured = measured.assign(written=measured["prompt_id"].isin(completions["prompt_id"]))
    order = ["mean_success", "written", "times_measured"]
    shown = measured.sort_values(order, ascending=[hardest, False, False], kind="stable").head(_LISTED)
    found = []
    for prompt in shown.to_dict("records"):
        own = completions[completions["prompt_id"] == prompt["prompt_id"]]
        newest = own[own["step"] == own["step"].max()].sort_values("correctness", ascending=hardest, kind="stable")
        one = newest.iloc[0] if len(newest) else None
        found.append(
            _Prompt(
                task=_text(prompt["task"]),
                shown=cut(_text(prompt["question"]), 110),
                question=cut(_text(prompt["question"])),
                answer=_text(prompt["answer"]),
                success=_rate(prompt["mean_success"]),
                measured=int(prompt["times_measured"]),
                forecast=_rate(prompt["forecast"]),
                completion=None
                if one is None
                else cut(whole_text(json.loads(turns)) if (turns := _text(one["turns"])) else _text(one["completion"])),
                right=one is not None and bool(one["correctness"] > CORRECT),
                reward="" if one is None else f"{one['reward']:.3g}",
                step=-1 if one is None else int(one["step"]),
            )
        )
    return found


def _text(value: object) -> str:
    return "" if value is None or value is pd.NA or value != value else str(value)


def _rate(value: object) -> str:
    return "-" if value is None or not isinstance(value, int | float) or np.isnan(value) else f"{value:.0%}"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{seconds:.1f} s"
