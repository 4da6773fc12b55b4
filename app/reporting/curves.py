"""Draw the curves of a run from its own record."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from app.runs.record import METRICS, Curve, read_record
from datamodules.ledger import STEP_PHASES

_PANELS = (
    ("Accuracy", "val/([^/]+/)?accuracy|val/pass@[0-9]+"),
    ("Reward", "reward|selection/mean_success"),
    ("What teaches", "selection/(informative_fraction|fresh_informative_fraction|uniform_informative_measured)"),
    ("Forecast quality", "difficulty/reference_pearson|selection/forecast_brier"),
    ("Replay", "replay/age_(mean|max)"),
    ("Completion length", "completions/(mean|max)_length"),
    ("Seconds per step, by phase", f"time/({'|'.join(STEP_PHASES)})"),
    ("Tokens per second", "tokens_per_second"),
    ("Gradient norm", "grad_norm"),
)
"""Titles of the panels, and regular expressions that match the whole names of their metrics."""
_PHASES = _PANELS[6][0]
_MOST_CURVES = 8  # in a panel


def read_scalars(folder: Path) -> dict[str, Curve]:
    """Return steps and values of every scalar in a run folder.

    Runs of earlier versions, and pretraining, have no record but TensorBoard events; a resumed run has several files.
    """
    if (folder / METRICS).exists():
        return read_record(folder)
    accumulator = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    accumulator.Reload()
    curves = {}
    for tag in accumulator.Tags()["scalars"]:
        # A step that was repeated after a resume counts once, the last time.
        points = {event.step: event.value for event in accumulator.Scalars(tag)}
        curves[tag] = (sorted(points), [points[step] for step in sorted(points)])
    return curves


def draw_curves(folder: Path, picture: Path) -> None:
    """Draw the curves of a run into a PNG. Nothing is drawn after a single step, which has no curve."""
    curves = read_scalars(folder)
    if all(len(steps) < 2 for steps, _ in curves.values()):
        return
    with matplotlib.rc_context({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}):
        figure = curves_figure(curves, f"{folder.parent.name} / {folder.name}")
        figure.savefig(picture, dpi=110)


def curves_figure(curves: Mapping[str, Curve], title: str = "") -> Figure:
    """Draw what was measured of accuracy, reward, informative fraction, forecast, replay, length, seconds per phase."""
    panels = []
    for heading, pattern in _PANELS:
        names = sorted(name for name in curves if re.fullmatch(pattern, name))[:_MOST_CURVES]
        if names:
            panels.append((heading, {name: curves[name] for name in names}))
    rows, head = -(-len(panels) // 3), 0.75 if title else 0.4
    figure = Figure(figsize=(12, 2.65 * rows + head + 0.2))
    height = figure.get_figheight()
    # Not the constrained layout, which takes as long as the drawing.
    figure.subplots_adjust(
        left=0.045, right=0.985, bottom=0.5 / height, top=1 - head / height, wspace=0.16, hspace=0.34
    )
    for place, (heading, of) in enumerate(panels):
        axes = figure.add_subplot(rows, 3, place + 1)
        axes.set_title(heading, loc="left", fontweight="bold")
        axes.set_xlabel("step")
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        (_draw_stack if heading == _PHASES else _draw_lines)(axes, of)
    if title:
        figure.suptitle(title, parse_math=False)
    return figure


def _draw_lines(axes: Axes, curves: Mapping[str, Curve]) -> None:
    for name, (steps, values) in curves.items():
        axes.plot(steps, values, marker="o" if len(steps) < 20 else "", markersize=3, label=name)
    low, high = axes.get_ylim()
    values = [value for _, of in curves.values() for value in of]
    if high - low > 0.2 and min(values) >= 0 and max(values) <= 1:  # fractions
        axes.set_ylim(0.0, 1.02)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)


def _draw_stack(axes: Axes, curves: Mapping[str, Curve]) -> None:
    steps = next(iter(curves.values()))[0]
    same = {name: values for name, (its, values) in curves.items() if its == steps}
    axes.stackplot(steps, list(same.values()), labels=[name.removeprefix("time/") for name in same], alpha=0.8)
    axes.set_ylim(0, 1.35 * axes.get_ylim()[1])  # room for the legend
    axes.legend(frameon=False, fontsize=7, ncols=3, loc="upper left")
