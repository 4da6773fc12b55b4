"""Table, JSON and pictures of `dots difficulty`."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from app.reporting.pictures import pixels, reliability_figure
from app.studies.difficulty_scoring import Scored

_WIDTH = 110
_DECIMALS = {"pearson": 3, "spearman": 3, "brier": 4, "ece": 3}
_HEADINGS = {"pearson": "Pearson", "spearman": "Spearman", "brier": "Brier", "ece": "ECE"}
_COLUMNS = 3
_STYLE: Any = {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}


@dataclass(frozen=True, slots=True)
class CurvePoint:
    """Figures of one fit of the learning curve: `method`, questions learnt from, and figures by name."""

    method: str
    questions: int
    figures: Mapping[str, float]


def summarise(results: Mapping[str, Sequence[Scored]]) -> dict[str, dict[str, dict[str, float]]]:
    """`{method: {figure: {"mean", "deviation"}}}` over folds; a figure that is undefined is left out."""
    return {method: _over_folds([scored.figures for scored in folds]) for method, folds in results.items()}


def write_results(path: Path, results: Mapping[str, Sequence[Scored]], settings: Mapping[str, Any]) -> None:
    """Writes `{"settings": ..., "methods": summarise(results)}`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {"settings": dict(settings), "methods": summarise(results)}
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def print_results(title: str, results: Mapping[str, Sequence[Scored]]) -> None:
    """Prints one row per method; a pipe gets the full width as well."""
    table = Table(title=title, title_justify="left")
    table.add_column("forecast")
    for heading in _HEADINGS.values():
        table.add_column(heading, justify="right")
    for method, figures in summarise(results).items():
        table.add_row(method, *(_shown(figures.get(name), _DECIMALS[name]) for name in _HEADINGS))
    console = Console()
    (console if console.is_terminal else Console(width=_WIDTH)).print(table)


def draw_reliability(path: Path, results: Mapping[str, Sequence[Scored]]) -> None:
    """One reliability picture per method, side by side, over all folds and visits."""
    drawn = []
    for method, folds in results.items():
        forecast = np.concatenate([scored.forecast for scored in folds])
        if len(forecast):
            measured = np.concatenate([scored.measured for scored in folds])
            drawn.append(pixels(reliability_figure(forecast, measured, method)))
    blank = np.full_like(drawn[0], 255)
    columns = min(_COLUMNS, len(drawn))
    drawn += [blank] * (-len(drawn) % columns)
    rows = [np.concatenate(drawn[start : start + columns], axis=1) for start in range(0, len(drawn), columns)]
    matplotlib.image.imsave(path, np.concatenate(rows))


def draw_curve(folder: Path, points: Sequence[CurvePoint]) -> None:
    """Writes `learning_curve.json` (every fit) and `learning_curve.png` (mean and deviation of Pearson over folds)."""
    content = [{"method": point.method, "questions": point.questions, **point.figures} for point in points]
    (folder / "learning_curve.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(6, 4), layout="constrained")
        axes = figure.add_subplot()
        for method in dict.fromkeys(point.method for point in points):
            sizes = sorted({point.questions for point in points if point.method == method})
            found = [
                [p.figures["pearson"] for p in points if p.method == method and p.questions == size] for size in sizes
            ]
            axes.errorbar(
                sizes, [np.mean(f) for f in found], yerr=[np.std(f) for f in found], fmt="o-", capsize=2, label=method
            )
        axes.set(xscale="log", xlabel="questions learnt from", ylabel="Pearson on questions never seen")
        axes.grid(alpha=0.3)
        axes.legend(frameon=False)
        figure.savefig(folder / "learning_curve.png", dpi=110)


def _over_folds(folds: Sequence[Mapping[str, float]]) -> dict[str, dict[str, float]]:
    values = {name: np.array([figures[name] for figures in folds]) for name in _HEADINGS}
    return {
        name: {"mean": float(found.mean()), "deviation": float(found.std())}
        for name, found in values.items()
        if np.isfinite(found).all()
    }


def _shown(figure: Mapping[str, float] | None, decimals: int) -> str:
    if figure is None:
        return "-"
    spread = f" ± {figure['deviation']:.{decimals}f}" if figure["deviation"] else ""
    return f"{figure['mean']:.{decimals}f}{spread}"
