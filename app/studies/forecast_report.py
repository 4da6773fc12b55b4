"""The table and the picture of a recorded-run study."""

from __future__ import annotations

from pathlib import Path
from textwrap import fill

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from app.studies.forecast_summary import Estimate, Summary

_LABEL_WIDTH = 48
_WIDTH = 148
"""Characters of the widest table: the label column and the figures beside it."""
_PANELS = (
    ("informative", "Informative share of the choice"),
    ("variance", "p (1 - p) of the choice"),
    ("pearson", "Forecast against all prompts: Pearson"),
    ("brier", "Forecast against all prompts: Brier"),
    ("distinct", "Share of the pool chosen so far"),
)


def print_table(title: str, notes: list[str], summaries: dict[str, Summary]) -> None:
    """Prints one row per selector; a pipe or a narrow terminal gets the full width too, so that no figure is cut."""
    console = Console(width=max(_WIDTH, Console().width))
    console.print(title, style="bold", highlight=False)
    console.print(forecast_table(summaries))
    for note in notes:
        console.print(note, style="dim", highlight=False)


def forecast_table(summaries: dict[str, Summary]) -> Table:
    """The table of a study; the column of unmeasured prompts is there when some selector measures references."""
    table = Table(box=SIMPLE_HEAD, padding=(0, 1))
    table.add_column("selector", overflow="fold", max_width=_LABEL_WIDTH)
    rows = {label: _cells(summary) for label, summary in summaries.items()}
    measured = any(summary.pearson_unmeasured != summary.pearson for summary in summaries.values())
    names = [name for name in next(iter(rows.values())) if measured or name != "Pearson, unmeasured"]
    for name in names:
        table.add_column(name.replace(", ", ",\n"), justify="right", no_wrap=True)
    for label, cells in rows.items():
        table.add_row(label, *(cells[name] for name in names))
    return table


def _cells(summary: Summary) -> dict[str, str]:
    return {
        "informative": _shown(summary.informative, 3, sem=True),
        "p (1 - p)": _shown(summary.variance, 3),
        "Pearson": _shown(summary.pearson, 3),
        "Pearson, unmeasured": _shown(summary.pearson_unmeasured, 3),
        "Brier": _shown(summary.brier, 4),
        "distinct": _shown(summary.distinct, 2),
        "rolled out": f"{summary.rollouts_per_step:.4g}",
        "ms / step": f"{1e3 * summary.seconds_per_step:.1f}",
    }


def _shown(estimate: Estimate, digits: int, sem: bool = False) -> str:
    if estimate.mean is None:
        return "-"
    error = f" +- {estimate.sem:.{digits}f}" if sem and estimate.sem is not None else ""
    return f"{estimate.mean:.{digits}f}{error}"


def draw_study(path: Path, title: str, table: pd.DataFrame) -> None:
    """Draws every figure over the visits into a PNG: mean of the seeds, with a band of one standard error."""
    with matplotlib.rc_context({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(13, 8), layout="constrained")
        panels = figure.subplots(2, 3).flatten()
        for axes, (name, heading) in zip(panels, _PANELS, strict=False):
            axes.set_title(heading, loc="left", fontweight="bold")
            _draw_panel(axes, table, name)
        handles, labels = panels[0].get_legend_handles_labels()
        panels[-1].axis("off")
        labels = [fill(label, _LABEL_WIDTH) for label in labels]
        # Long labels must not shrink the panels.
        panels[-1].legend(handles, labels, frameon=False, loc="upper left").set_in_layout(False)
        figure.suptitle(title)
        figure.savefig(path, dpi=110)


def _draw_panel(axes: Axes, table: pd.DataFrame, name: str) -> None:
    for place, (label, rows) in enumerate(table.groupby("selector", sort=False)):
        visits = rows.groupby("visit")[name]
        mean, sem = visits.mean(), visits.sem().fillna(0.0)
        color = "0.5" if label == "oracle" else f"C{place % 10}"
        style = "--" if label == "oracle" else ("-", "-.", ":")[place // 10 % 3]
        if not np.isfinite(mean).any():
            continue
        axes.plot(mean.index, mean, style, color=color, label=label, linewidth=1.4)
        axes.fill_between(mean.index, mean - sem, mean + sem, color=color, alpha=0.2, linewidth=0)
    axes.set_xlabel("visit")
    axes.grid(alpha=0.3)
