"""A comparison as one HTML file that needs neither scripts nor a network."""

from __future__ import annotations

from dataclasses import dataclass
from html import escape
from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter

from app.reporting.html import SVG_STYLE, render, svg_of
from app.studies.compare.figures import Figures
from app.studies.compare.reach import smooth
from app.studies.compare.records import Comparison
from app.studies.compare.tables import ceiling_line, sections, setting_lines, title_of

_AXES = {
    "time": "training clock, s",
    "completions": "completions rolled out",
    "tokens": "completion tokens rolled out",
    "steps": "training steps",
}
_INFORMATIVE = {
    "rolled out": "selection/fresh_informative_fraction",
    "trained on (replayed groups included)": "selection/informative_fraction",
}
_FORECAST = {
    "Brier score of the choice": "selection/forecast_brier",
    "Pearson of the choice": "selection/forecast_pearson",
    "Pearson, uniform references": "difficulty/reference_pearson",
}
_PHASES = ("select", "rollout", "reference", "reward", "update", "sync")
_POINTS = 81  # of a mean curve
_WINDOWS = 25  # per run, over which a metric of single steps is averaged
# The palette of Okabe and Ito, distinct for colour-blind readers too, and three more; beyond these lines are dashed.
_COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7f5af0", "#8c510a", "#b2182b")
_GREY = "#6b7280"
_PHASE_COLORS = (_GREY, "#0072b2", "#56b4e9", "#cc79a7", "#d55e00", "#e69f00", "#c9ced6")
Curve = tuple[np.ndarray, np.ndarray]


@dataclass(frozen=True, slots=True)
class _ArmStyle:
    name: str
    color: str
    dash: str


def page(comparison: Comparison, figures: Figures) -> str:
    """Return the whole file."""
    baseline = comparison.request.baseline
    others = [arm.name for arm in comparison.request.arms if arm.name != baseline]
    styles = []
    for arm in comparison.request.arms:
        rank = others.index(arm.name) if arm.name in others else 0
        color = _GREY if arm.name == baseline else _COLORS[rank % len(_COLORS)]
        styles.append(_ArmStyle(arm.name, color, "--" if rank >= len(_COLORS) else "-"))
    with matplotlib.rc_context(SVG_STYLE):
        # Key, title, text before the labels, and SVG by label: nothing where no run logged the metric.
        panels = [
            ("accuracy", "Accuracy", "against", _accuracy_charts(comparison, figures, styles)),
            ("phases", "Seconds by phase", "", _phase_charts(figures["arms"])),
            ("informative", "Informative groups", "of those", _metric_charts(comparison, styles, "informative")),
            ("forecast", "Forecast quality", "", _metric_charts(comparison, styles, "forecast")),
        ]
    return render(
        Path(__file__).with_name("page.html.jinja"),
        title=title_of(figures),
        baseline=baseline,
        setting=setting_lines(figures["setting"]),
        sections=[(title, note, table.to_html(border=0)) for title, note, table in sections(figures)],
        ceiling=ceiling_line(figures),
        arms=styles,
        panels=panels,
        differences=comparison.differences,
    )


def _accuracy_charts(comparison: Comparison, figures: Figures, styles: list[_ArmStyle]) -> dict[str, str]:
    """Accuracy against each cost: faint, every evaluation of every seed; bold, the smoothed mean over seeds."""
    found, baseline = {}, comparison.request.baseline
    for place, (cost, label) in enumerate(_AXES.items()):
        axes, key = _axes(label, "accuracy on held-out prompts"), f"accuracy-{place}"
        for number, arm in enumerate(styles):
            smoothed = []
            for record in comparison.of(arm.name):
                x, accuracy = record.course.costs[cost], record.course.accuracy
                smoothed.append((x, smooth(accuracy, comparison.request.window)))
                axes.plot(
                    x, accuracy, arm.dash, color=arm.color, alpha=0.35, linewidth=0.8,
                    marker="o", markersize=2.5, gid=f"arm-{number}-seed-{record.seed}-{key}",
                    label=f"{arm.name} seed {record.seed}",
                )  # fmt: skip
            _draw_mean(axes, number, arm, smoothed, key)
        if baseline in figures["arms"]:
            goal = figures["arms"][baseline]["final_accuracy"]["mean"]
            level = f"final accuracy of {baseline}"
            axes.axhline(goal, color=_GREY, linestyle="--", linewidth=0.9, gid=f"level-{key}", label=level)
            axes.annotate(level, (1, goal), (-4, 3), ("axes fraction", "data"), "offset points", ha="right")
        found[cost] = _svg(axes, key)
    return found


def _metric_charts(comparison: Comparison, styles: list[_ArmStyle], panel: str) -> dict[str, str]:
    """Metrics of single steps against the steps, averaged over windows of the run and over seeds."""
    found = {}
    metrics = _INFORMATIVE if panel == "informative" else _FORECAST
    for place, (label, metric) in enumerate(metrics.items()):
        axes = _axes(_AXES["steps"], "informative fraction" if panel == "informative" else label)
        for number, arm in enumerate(styles):
            curves = []
            for record in comparison.of(arm.name):
                steps, values = (np.array(part, dtype=float) for part in record.curves.get(metric, ([], [])))
                curves.append((steps, smooth(values, -(-len(values) // _WINDOWS))))
            _draw_mean(axes, number, arm, curves, f"{panel}-{place}")
        found[label] = _svg(axes, f"{panel}-{place}")
    return found


def _phase_charts(arms: Figures) -> dict[str, str]:
    """Seconds by phase, of a step and of a whole run; "other" is the rest of the training clock."""
    seconds = pd.DataFrame({name: arm["seconds"] for name, arm in arms.items()}).T
    run = seconds[list(_PHASES)]
    run = run.assign(other=(seconds["training"] - run.sum(axis=1)).clip(lower=0))
    steps = pd.Series({name: max(1.0, arm["totals"]["steps"]) for name, arm in arms.items()})
    found = {}
    for place, (label, table) in enumerate({"of a step": run.div(steps, axis=0), "of a run": run}.items()):
        axes = Figure(figsize=(6.4, 0.9 + 0.34 * len(arms)), layout="constrained").subplots()
        bars = []
        ends = table.cumsum(axis=1)
        for number, phase in enumerate(table):
            left = ends[phase] - table[phase]
            bars.append(axes.barh(table.index, table[phase], left=left, color=_PHASE_COLORS[number], label=phase))
            for row, (bar, name) in enumerate(zip(bars[-1], table.index, strict=True)):
                bar.set_gid(f"part-{number}-{row}-phases-{place}")
                bar.set_label(f"{name}: {phase} {table[phase].iloc[row]:.2f} s")
        axes.bar_label(bars[-1], [f"{one:.3g} s" for one in ends["other"]], padding=4)
        axes.invert_yaxis()
        axes.figure.legend(handles=bars, loc="outside lower left", ncols=len(bars), frameon=False, handlelength=1)
        found[label] = _svg(axes, f"phases-{place}")
    return found


def _axes(x_label: str, y_label: str) -> Axes:
    axes = Figure(figsize=(6.4, 3.4), layout="constrained").subplots()
    axes.set(xlabel=x_label, ylabel=y_label)
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.grid(axis="y")
    return axes


def _draw_mean(axes: Axes, number: int, arm: _ArmStyle, curves: list[Curve], key: str) -> None:
    """Draw the mean of curves over the range that all of them cover, linear between their points."""
    curves = [curve for curve in curves if len(curve[0])]
    low = max((float(x[0]) for x, _ in curves), default=1.0)
    high = min((float(x[-1]) for x, _ in curves), default=0.0)
    if low <= high:
        grid = np.linspace(low, high, _POINTS)
        mean = np.mean([np.interp(grid, x, y) for x, y in curves], axis=0)
        gid = f"arm-{number}-mean-{key}"
        axes.plot(grid, mean, arm.dash, color=arm.color, linewidth=2, gid=gid, label=arm.name)


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
