"""Report the scores of difficulty forecasts: table, JSON and pictures."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from app.reporting.pictures import pixels, reliability_figure
from app.studies.difficulty.forecasters import Scored

Results = Mapping[str, Sequence[Scored]]
"""The scores of every method, fold by fold."""

_COLUMNS = {"pearson": ("Pearson", 3), "spearman": ("Spearman", 3), "brier": ("Brier", 4), "ece": ("ECE", 3)}
_PICTURES_PER_ROW = 3


def summarise(results: Results) -> dict[str, dict[str, dict[str, float]]]:
    """Return `{method: {figure: {"mean", "deviation"}}}` over folds, without undefined figures."""
    found: dict[str, dict[str, dict[str, float]]] = {}
    for method, folds in results.items():
        figures = pd.DataFrame([scored.figures for scored in folds])
        found[method] = {
            name: {"mean": float(values.mean()), "deviation": float(values.std(ddof=0))}
            for name, values in figures.items()
            if np.isfinite(values).all()
        }
    return found


def write_results(path: Path, results: Results, settings: Mapping[str, Any]) -> None:
    """Write `{"settings": ..., "methods": summarise(results)}`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {"settings": dict(settings), "methods": summarise(results)}
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def print_results(title: str, results: Results) -> None:
    """Print a row per method: the mean over folds of each figure, and its deviation where there are several."""
    rows = {}
    for method, figures in summarise(results).items():
        rows[method] = {heading: "-" for heading, _ in _COLUMNS.values()}
        for name, figure in figures.items():
            heading, decimals = _COLUMNS[name]
            spread = f" ± {figure['deviation']:.{decimals}f}" if figure["deviation"] else ""
            rows[method][heading] = f"{figure['mean']:.{decimals}f}{spread}"
    print(f"{title}\n\n{pd.DataFrame.from_dict(rows, orient='index').to_string()}")


def draw_reliability(path: Path, results: Results) -> None:
    """Draw one reliability picture per method over all folds and visits, side by side."""
    drawn = []
    for method, folds in results.items():
        forecast = np.concatenate([scored.forecast for scored in folds])
        if len(forecast):
            measured = np.concatenate([scored.measured for scored in folds])
            drawn.append(pixels(reliability_figure(forecast, measured, method)))
    if not drawn:  # no visit has measured enough of the tested questions
        return
    blank = np.full_like(drawn[0], 255)
    columns = min(_PICTURES_PER_ROW, len(drawn))
    drawn += [blank] * (-len(drawn) % columns)
    rows = [np.concatenate(drawn[start : start + columns], axis=1) for start in range(0, len(drawn), columns)]
    matplotlib.image.imsave(path, np.concatenate(rows))


def draw_curve(folder: Path, fits: Sequence[Mapping[str, object]]) -> None:
    """Print and write the learning curves (`learning_curve.json`), and draw the one over questions (`.png`).

    Each fit is its `method`, the numbers of `questions` and `visits` that it learnt from, and its figures by name.
    """
    table = pd.DataFrame(fits)
    means = table.groupby(["questions", "visits", "method"], sort=False)["pearson"].mean().unstack()
    print(f"\nPearson by what was learnt from\n\n{means.sort_index().round(3).to_string()}")
    plain = table.astype(object).where(lambda table: table.notna(), None).to_dict("records")  # NaN as null
    (folder / "learning_curve.json").write_text(json.dumps(plain, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    with matplotlib.rc_context({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(6, 4), layout="constrained")
        axes = figure.add_subplot()
        for method, rows in table[table["visits"] == table["visits"].max()].groupby("method", sort=False):
            sizes = rows.groupby("questions")["pearson"]
            mean, deviation = sizes.mean(), sizes.std(ddof=0)
            axes.errorbar(mean.index, mean, yerr=deviation, fmt="o-", capsize=2, label=method)
        axes.set(xscale="log", xlabel="questions learnt from", ylabel="Pearson on questions never seen")
        axes.grid(alpha=0.3)
        axes.legend(frameon=False)
        figure.savefig(folder / "learning_curve.png", dpi=110)
