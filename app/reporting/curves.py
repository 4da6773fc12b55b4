"""Draw the curves of a run from its own record."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from app.runs.record import METRICS, Curve, read_record

_INFORMATIVE = ("informative_fraction", "fresh_informative_fraction", "uniform_informative_measured")
_PANELS = (
    ("Accuracy", ("val/accuracy", "val/pass@4"), (0.0, 1.0)),
    ("Reward", ("reward", "selection/mean_success"), (0.0, 1.0)),
    ("What teaches", tuple(f"selection/{name}" for name in _INFORMATIVE), (0.0, 1.0)),
    ("Forecast quality", ("difficulty/reference_pearson", "selection/forecast_brier"), (-0.2, 1.0)),
    ("Replay", ("replay/age_mean", "replay/age_max"), None),
    ("Completion length", ("completions/mean_length", "completions/max_length"), None),
    ("Tokens per second", ("tokens_per_second",), None),
    ("Gradient norm", ("grad_norm",), None),
)
_PHASES = ("select", "rollout", "reference", "reward", "update", "sync")
_PHASES_PANEL = 6


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
        figure = curves_figure(curves)
        figure.suptitle(f"{folder.parent.name} / {folder.name}", parse_math=False)
        figure.savefig(picture, dpi=110)


def curves_figure(curves: Mapping[str, Curve]) -> Figure:
    """Draw accuracy, reward, informative fraction, forecast, replay, length and seconds per phase."""
    figure = Figure(figsize=(12, 9))
    # Not the constrained layout, which takes as long as the drawing.
    figure.subplots_adjust(left=0.045, right=0.985, bottom=0.055, top=0.92, wspace=0.16, hspace=0.34)
    panels = figure.subplots(3, 3).flatten().tolist()
    _draw_phases(panels.pop(_PHASES_PANEL), curves)
    for axes, (title, tags, limits) in zip(panels, _PANELS, strict=True):
        _draw_panel(axes, title, {tag: curves[tag] for tag in tags if tag in curves}, limits)
    return figure


def _draw_panel(axes: Axes, title: str, curves: dict[str, Curve], limits: tuple[float, float] | None) -> None:
    axes.set_title(title, loc="left", fontweight="bold")
    axes.set_xlabel("step")
    for tag, (steps, values) in curves.items():
        axes.plot(steps, values, marker="o" if len(steps) < 20 else "", markersize=3, label=tag)
    if limits:
        axes.set_ylim(*limits)
    axes.grid(alpha=0.3)
    if curves:
        axes.legend(frameon=False)
    else:
        axes.text(0.5, 0.5, "not measured in this run", ha="center", transform=axes.transAxes, color="gray")


def _draw_phases(axes: Axes, curves: Mapping[str, Curve]) -> None:
    axes.set_title("Seconds per step, by phase", loc="left", fontweight="bold")
    axes.set_xlabel("step")
    tags = [f"time/{phase}" for phase in _PHASES if f"time/{phase}" in curves]
    if tags:
        steps = curves[tags[0]][0]
        tags = [tag for tag in tags if curves[tag][0] == steps]
        axes.stackplot(steps, [curves[tag][1] for tag in tags], labels=tags, alpha=0.8)
        axes.legend(frameon=False, fontsize=7)
