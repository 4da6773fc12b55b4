"""Pictures of a selection: the kept prompts among the measured ones."""

from __future__ import annotations

from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

_STYLE: dict[Any, Any] = {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}
_BINS = 40


def learnalign_figure(success_rate: np.ndarray, score: np.ndarray, kept: np.ndarray) -> Figure:
    """Draw scores by rank, scores against success rates, and the success rates of the kept prompts; `[Q]` each."""
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(13, 4), layout="constrained")
        ranked, scattered, rates = figure.subplots(1, 3)
        ranked.set_title("Scores by rank", loc="left", fontweight="bold")
        ranked.plot(np.sort(score)[::-1], color="tab:gray", linewidth=1.5)
        ranked.axvline(int(kept.sum()) - 0.5, color="tab:blue", linewidth=1, label=f"{int(kept.sum())} kept")
        ranked.set(xlabel="rank", ylabel="score")
        ranked.legend(frameon=False)
        scattered.set_title("Score against success", loc="left", fontweight="bold")
        # Rates are multiples of 1/G: a fixed jitter separates their dots.
        spread = 0.03 * ((np.arange(len(score)) * 0.6180339887) % 1.0 - 0.5)
        for chosen, label, color in ((~kept, "left out", "tab:gray"), (kept, "kept", "tab:blue")):
            scattered.scatter((success_rate + spread)[chosen], score[chosen], s=6, alpha=0.5, color=color, label=label)
        scattered.set(xlabel="success rate", ylabel="score")
        scattered.legend(frameon=False)
        _draw_histogram(rates, "Success of the kept", success_rate, kept, "success rate", np.linspace(0, 1, 18))
    return figure


def ufo_figure(confidence: np.ndarray, kept: np.ndarray) -> Figure:
    """Draw the confidences of the pool and of the kept prompts; `[Q]` each."""
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(7, 4), layout="constrained")
        edges = np.histogram_bin_edges(confidence[np.isfinite(confidence)], bins=_BINS)
        _draw_histogram(figure.subplots(), "Confidence", confidence, kept, "mean token log-probability (nats)", edges)
    return figure


def _draw_histogram(
    axes: Axes, title: str, values: np.ndarray, kept: np.ndarray, label: str, edges: np.ndarray
) -> None:
    axes.set_title(title, loc="left", fontweight="bold")
    known, bins = np.isfinite(values), edges.tolist()
    axes.hist(values[known], bins=bins, color="tab:gray", alpha=0.5, label=f"pool ({len(values)})")
    axes.hist(values[kept & known], bins=bins, color="tab:blue", label=f"kept ({int(kept.sum())})")
    axes.set(xlabel=label, ylabel="prompts")
    axes.legend(frameon=False)
