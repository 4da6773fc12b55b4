"""A comparison as one HTML file that needs neither scripts nor a network."""

from __future__ import annotations

from html import escape
from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from app.reporting.html import SVG_STYLE, render, svg_of
from app.studies.compare.accuracy import AXES, GREY, ArmStyle, draw_accuracy, draw_mean, new_axes, styles_of
from app.studies.compare.figures import Figures
from app.studies.compare.reach import smooth
from app.studies.compare.records import Comparison
from app.studies.compare.tables import ceiling_line, sections, setting_lines, title_of
from datamodules.ledger import STEP_PHASES

_INFORMATIVE = {
    "rolled out": "selection/fresh_informative_fraction",
    "trained on (replayed groups included)": "selection/informative_fraction",
}
_FORECAST = {
    "Brier score of the choice": "selection/forecast_brier",
    "Pearson of the choice": "selection/forecast_pearson",
    "Pearson, uniform references": "difficulty/reference_pearson",
}
_WINDOWS = 25  # per run, over which a metric of single steps is averaged
_PHASE_COLORS = {
    "select": GREY, "rollout": "#0072b2", "environment": "#009e73", "reference": "#56b4e9", "reward": "#cc79a7",
    "update": "#d55e00", "sync": "#e69f00", "other": "#c9ced6",
}  # fmt: skip


def page(comparison: Comparison, figures: Figures) -> str:
    """Return the whole file."""
    styles = styles_of(comparison)
    with matplotlib.rc_context(SVG_STYLE):
        accuracy = {}
        for place, cost in enumerate(AXES):
            key = f"accuracy-{place}"
            accuracy[cost] = _svg(draw_accuracy(comparison, figures, cost, key), key)
        # Key, title, text before the labels, and SVG by label: nothing where no run logged the metric.
        panels = [
            ("accuracy", "Accuracy", "against", accuracy),
            ("phases", "Seconds by phase", "", _phase_charts(figures["arms"])),
            ("informative", "Informative groups", "of those", _metric_charts(comparison, styles, "informative")),
            ("forecast", "Forecast quality", "", _metric_charts(comparison, styles, "forecast")),
        ]
    return render(
        Path(__file__).with_name("page.html.jinja"),
        title=title_of(figures),
        baseline=comparison.request.baseline,
        setting=setting_lines(figures["setting"]),
        sections=[(title, note, table.to_html(border=0)) for title, note, table in sections(figures)],
        ceiling=ceiling_line(figures),
        arms=styles,
        panels=panels,
        differences=comparison.differences,
    )


def _metric_charts(comparison: Comparison, styles: list[ArmStyle], panel: str) -> dict[str, str]:
    """Metrics of single steps against the steps, averaged over windows of the run and over seeds."""
    found = {}
    metrics = _INFORMATIVE if panel == "informative" else _FORECAST
    for place, (label, metric) in enumerate(metrics.items()):
        axes = new_axes(AXES["steps"], "informative fraction" if panel == "informative" else label)
        for number, arm in enumerate(styles):
            curves = []
            for record in comparison.of(arm.name):
                steps, values = (np.array(part, dtype=float) for part in record.curves.get(metric, ([], [])))
                curves.append((steps, smooth(values, -(-len(values) // _WINDOWS))))
            draw_mean(axes, number, arm, curves, f"{panel}-{place}")
        found[label] = _svg(axes, f"{panel}-{place}")
    return found


def _phase_charts(arms: Figures) -> dict[str, str]:
    """Seconds by phase that takes any, of a step and of a whole run; "other" is the rest of the training clock."""
    seconds = pd.DataFrame({name: arm["seconds"] for name, arm in arms.items()}).T
    run = seconds[[phase for phase in STEP_PHASES if seconds[phase].any()]]
    run = run.assign(other=(seconds["training"] - run.sum(axis=1)).clip(lower=0))
    steps = pd.Series({name: max(1.0, arm["totals"]["steps"]) for name, arm in arms.items()})
    found = {}
    for place, (label, table) in enumerate({"of a step": run.div(steps, axis=0), "of a run": run}.items()):
        axes = Figure(figsize=(6.4, 0.9 + 0.34 * len(arms)), layout="constrained").subplots()
        bars = []
        ends = table.cumsum(axis=1)
        for number, phase in enumerate(table):
            left = ends[phase] - table[phase]
            bars.append(axes.barh(table.index, table[phase], left=left, color=_PHASE_COLORS[phase], label=phase))
            for row, (bar, name) in enumerate(zip(bars[-1], table.index, strict=True)):
                bar.set_gid(f"part-{number}-{row}-phases-{place}")
                bar.set_label(f"{name}: {phase} {table[phase].iloc[row]:.2f} s")
        axes.bar_label(bars[-1], [f"{one:.3g} s" for one in ends["other"]], padding=4)
        axes.invert_yaxis()
        axes.figure.legend(handles=bars, loc="outside lower left", ncols=len(bars), frameon=False, handlelength=1)
        found[label] = _svg(axes, f"phases-{place}")
    return found


def _svg(axes: Axes, key: str) -> str:
    """Save a chart as an `<svg>` element in which every artist with a gid shows its label when pointed at."""
    figure = axes.get_figure(root=True)
    assert figure is not None
    artists = [one for one in (*axes.lines, *axes.patches) if one.get_gid()]
    if not artists:
        return ""
    if axes.lines:
        axes.set_xlim(0, max(float(np.max(line.get_xdata())) for line in axes.lines) or 1.0)
    axes.patch.set_gid(f"plane-{key}")
    svg = svg_of(figure, key)
    for artist in artists:
        tag = f'<g id="{artist.get_gid()}">'
        svg = svg.replace(tag, f"{tag}<title>{escape(str(artist.get_label()))}</title>")
    return svg
