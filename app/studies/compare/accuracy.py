"""Accuracy of the arms against a cost: charts of the page, and a picture beside it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter

from app.studies.compare.figures import Figures
from app.studies.compare.reach import smooth
from app.studies.compare.records import Comparison
from app.studies.compare.tables import ratio_text

AXES = {
    "time": "training clock, s",
    "completions": "completions rolled out",
    "tokens": "completion tokens rolled out",
    "steps": "training steps",
}
"""Labels of the costs that accuracy is drawn against, the training clock first."""
GREY = "#6b7280"
# The palette of Okabe and Ito, distinct for colour-blind readers too, and three more; beyond these lines are dashed.
_COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7f5af0", "#8c510a", "#b2182b")
_POINTS = 81  # of a mean curve
Curve = tuple[np.ndarray, np.ndarray]


@dataclass(frozen=True, slots=True)
class ArmStyle:
    """How the curves of an arm are drawn in every chart."""

    name: str
    color: str
    dash: str


def styles_of(comparison: Comparison) -> list[ArmStyle]:
    """Return the style of each arm: grey for the baseline."""
    baseline = comparison.request.baseline
    others = [arm.name for arm in comparison.request.arms if arm.name != baseline]
    styles = []
    for arm in comparison.request.arms:
        rank = others.index(arm.name) if arm.name in others else 0
        color = GREY if arm.name == baseline else _COLORS[rank % len(_COLORS)]
        styles.append(ArmStyle(arm.name, color, "--" if rank >= len(_COLORS) else "-"))
    return styles


def new_axes(x_label: str, y_label: str) -> Axes:
    """Return the axes of a chart of curves."""
    axes = Figure(figsize=(6.4, 3.4), layout="constrained").subplots()
    axes.set(xlabel=x_label, ylabel=y_label)
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.grid(axis="y")
    return axes


def draw_mean(axes: Axes, number: int, arm: ArmStyle, curves: list[Curve], key: str) -> None:
    """Draw the mean of curves over the range that all of them cover, linear between their points."""
    curves = [curve for curve in curves if len(curve[0])]
    low = max((float(x[0]) for x, _ in curves), default=1.0)
    high = min((float(x[-1]) for x, _ in curves), default=0.0)
    if low <= high:
        grid = np.linspace(low, high, _POINTS)
        mean = np.mean([np.interp(grid, x, y) for x, y in curves], axis=0)
        gid = f"arm-{number}-mean-{key}"
        axes.plot(grid, mean, arm.dash, color=arm.color, linewidth=2, gid=gid, label=arm.name)


def draw_accuracy(comparison: Comparison, figures: Figures, cost: str, key: str) -> Axes:
    """Return a chart of accuracy: faint, every evaluation of every seed; bold, the smoothed mean over seeds."""
    axes, baseline = new_axes(AXES[cost], "accuracy on held-out prompts"), comparison.request.baseline
    for number, arm in enumerate(styles_of(comparison)):
        smoothed = []
        for record in comparison.of(arm.name):
            x, accuracy = record.course.costs[cost], record.course.accuracy
            smoothed.append((x, smooth(accuracy, comparison.request.window)))
            axes.plot(
                x, accuracy, arm.dash, color=arm.color, alpha=0.35, linewidth=0.8,
                marker="o", markersize=2.5, gid=f"arm-{number}-seed-{record.seed}-{key}",
                label=f"{arm.name} seed {record.seed}",
            )  # fmt: skip
        draw_mean(axes, number, arm, smoothed, key)
    if baseline in figures["arms"]:
        goal = figures["arms"][baseline]["final_accuracy"]["mean"]
        level = f"final accuracy of {baseline}"
        axes.axhline(goal, color=GREY, linestyle="--", linewidth=0.9, gid=f"level-{key}", label=level)
        axes.annotate(level, (1, goal), (-4, 3), ("axes fraction", "data"), "offset points", ha="right")
    return axes


def save_picture(comparison: Comparison, figures: Figures, file: Path) -> None:
    """Write the chart of accuracy against the training clock as a PNG, with each arm's time ratio in its legend."""
    with matplotlib.rc_context({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False}):
        axes = draw_accuracy(comparison, figures, "time", "picture")
        lines = {str(line.get_gid()): line for line in axes.lines}
        shown, texts = [], []
        for number, arm in enumerate(comparison.request.arms):
            if line := lines.get(f"arm-{number}-mean-picture"):
                times = figures["arms"][arm.name]["time_ratio"]
                of_baseline = arm.name == comparison.request.baseline or times["mean"] is None
                shown.append(line)
                texts.append(arm.name if of_baseline else f"{arm.name}: {ratio_text(times)}")
        title = f"time to the final accuracy of {comparison.request.baseline}, relative to its own"
        axes.legend(shown, texts, title=title, loc="lower right", frameon=False)
        axes.set_xlim(left=0)
        axes.grid(axis="y", alpha=0.25)
        figure = axes.get_figure(root=True)
        assert figure is not None
        figure.savefig(file, dpi=150)
