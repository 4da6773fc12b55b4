"""Draw forecasts against measured success, for TensorBoard and for files."""

from __future__ import annotations

from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from app.reporting.forecast_quality import Reliability, brier, pearson, reliability

_STYLE: Any = {"font.size": 8, "axes.spines.top": False, "axes.spines.right": False}
_MARGINS = {"left": 0.14, "right": 0.96, "bottom": 0.12, "top": 0.85}


def reliability_figure(
    forecast: np.ndarray, measured: np.ndarray, title: str, bins: int = 10, uniform: np.ndarray | None = None
) -> Figure:
    """Draw mean measured success against mean forecast by bin, with two standard errors; bars count the forecasts.

    Rates are float64 `[N]`, binned into equal parts of [0, 1]. `uniform`, float64 `[M, 2]`, are the forecast and
    measured rates of prompts drawn uniformly, drawn as well.
    """
    with matplotlib.rc_context(_STYLE):
        figure, axes = _square(title)
        table = reliability(forecast, measured, bins)
        if len(forecast):
            counts = axes.twinx()
            counts.bar(table.forecast, table.count, width=0.8 / bins, color="tab:gray", alpha=0.25)
            counts.set_ylim(0, 4 * table.count.max())
            counts.set_yticks([])
            counts.spines["right"].set_visible(False)
            _draw_reliability(axes, table, "tab:blue", f"chosen: N {len(forecast)}, ECE {table.error:.3f}")
        if uniform is not None and len(uniform):
            table = reliability(uniform[:, 0], uniform[:, 1], bins)
            _draw_reliability(axes, table, "tab:orange", f"uniform references: N {len(uniform)}, ECE {table.error:.3f}")
        _legend(figure, axes)
    return figure


def scatter_figure(forecast: np.ndarray, measured: np.ndarray, title: str, uniform: np.ndarray | None = None) -> Figure:
    """Draw a dot per rolled-out prompt: measured success against the forecast.

    Arguments as for `reliability_figure`. Measured rates are multiples of 1/G; dots are spread vertically by a fixed
    pattern of less than 0.02 to tell them apart.
    """
    with matplotlib.rc_context(_STYLE):
        figure, axes = _square(title)
        if uniform is not None and len(uniform):
            _draw_dots(axes, uniform[:, 0], uniform[:, 1], "tab:orange", "uniform references")
        if len(forecast):
            _draw_dots(axes, forecast, measured, "tab:blue", "chosen")
        _legend(figure, axes)
    return figure


def pixels(figure: Figure) -> np.ndarray:
    """Render a figure to uint8 `[height, width, 3]`."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def _draw_reliability(axes: Axes, table: Reliability, color: str, label: str) -> None:
    axes.errorbar(
        table.forecast, table.measured, yerr=2 * table.standard_error,
        fmt="o-", markersize=4, linewidth=1, capsize=2, color=color, label=label,
    )  # fmt: skip


def _draw_dots(axes: Axes, forecast: np.ndarray, measured: np.ndarray, color: str, label: str) -> None:
    # Multiples of the golden ratio spread evenly and need no random numbers.
    spread = 0.04 * ((np.arange(len(measured)) * 0.6180339887) % 1.0 - 0.5)
    correlation = pearson(forecast, measured)
    shown = "-" if np.isnan(correlation) else f"{correlation:.2f}"
    label = f"{label}: N {len(forecast)}, Pearson {shown}, Brier {brier(forecast, measured):.3f}"
    axes.plot(forecast, measured + spread, "o", color=color, label=label, markersize=3, markeredgewidth=0, alpha=0.5)


def _square(title: str) -> tuple[Figure, Axes]:
    """Return axes from (0, 0) to (1, 1) with the diagonal of a perfect forecast."""
    figure = Figure(figsize=(4.2, 4.0), dpi=100)
    # Fixed margins: computing a layout would take longer than the drawing.
    figure.subplots_adjust(**_MARGINS)
    figure.text(_MARGINS["left"], 0.96, title)
    axes = figure.add_subplot()
    axes.set(xlim=(-0.03, 1.03), ylim=(-0.03, 1.03), xlabel="success rate forecast", ylabel="success rate measured")
    axes.plot([0, 1], [0, 1], color="tab:gray", linewidth=0.8, linestyle="--")
    axes.grid(alpha=0.3)
    return figure, axes


def _legend(figure: Figure, axes: Axes) -> None:
    """Put the legend above the axes, where it hides no dot."""
    handles, labels = axes.get_legend_handles_labels()
    place = (_MARGINS["left"] - 0.02, 0.955)
    figure.legend(handles, labels, loc="upper left", bbox_to_anchor=place, frameon=False, borderaxespad=0.2)
