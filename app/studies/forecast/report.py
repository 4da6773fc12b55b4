"""Summarise the replays of a study: table, JSON and picture."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from textwrap import fill

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from app.studies.forecast.recorded_run import Replay

SO_FAR = ("calibration", "distinct")
"""Fields of `Replay` that are about all visits so far."""
PER_VISIT = ("informative", "variance", "pearson", "pearson_unmeasured", "brier", *SO_FAR, "rollouts", "seconds")
"""The columns of the table of visits: the fields of `Replay` with one number per visit."""

_LABEL_WIDTH = 48
_PANELS = {
    "informative": "Informative share of the choice",
    "variance": "p (1 - p) of the choice",
    "pearson": "Forecast against all prompts: Pearson",
    "brier": "Forecast against all prompts: Brier",
    "distinct": "Share of the pool chosen so far",
}


def visits_table(replays: Mapping[str, Sequence[Replay]], first: int) -> pd.DataFrame:
    """Return a row per selector, seed and visit; visits are numbered as in the recorded run, from `first`."""
    frames = []
    for label, runs in replays.items():
        for seed, run in enumerate(runs):
            columns = {name: getattr(run, name) for name in PER_VISIT}
            visits = np.arange(first, first + len(run.seconds))
            frames.append(pd.DataFrame({"selector": label, "seed": seed, "visit": visits, **columns}))
    return pd.concat(frames, ignore_index=True)


def summarise(table: pd.DataFrame) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Summarise a `visits_table`: means over the visits of a seed (`SO_FAR`: the last visit), then over the seeds.

    Return means and standard errors over the seeds: a row per selector, columns `PER_VISIT`. NaN values are left out;
    a figure is NaN where there was no forecast, a standard error for a single seed.
    """
    runs = table.groupby(["selector", "seed"], sort=False)
    last = runs[list(SO_FAR)].last()
    seeds = runs[list(PER_VISIT)].mean().assign(**dict(last.items())).groupby("selector", sort=False)
    return seeds.mean(), seeds.sem()


def write_json(path: Path, mean: pd.DataFrame, sem: pd.DataFrame) -> None:
    """Write the figures of every selector by name.

    `{selector: {"informative": {"mean", "sem"}, "variance", "pearson", "pearson_unmeasured", "brier", "calibration",
    "distinct", "rollouts_per_step", "seconds_per_step", "sem": {...}}}` with the other figures' standard errors under
    `sem`; an undefined figure is null.
    """
    means, errors = (frame.astype(object).where(frame.notna(), None) for frame in (mean, sem))
    content = {}
    for label, row in means.iterrows():
        error = errors.loc[label]
        others = ["variance", "pearson", "pearson_unmeasured", "brier", *SO_FAR]
        content[label] = {
            "informative": {"mean": row.informative, "sem": error.informative},
            **row[others],
            "rollouts_per_step": row.rollouts,
            "seconds_per_step": row.seconds,
            "sem": dict(error[others]),
        }
    path.write_text(json.dumps(content, indent=2, allow_nan=False) + "\n")


def print_table(title: str, notes: Sequence[str], mean: pd.DataFrame, sem: pd.DataFrame) -> None:
    """Print a row per selector, and the notes; correlations without the references where a selector uses them."""
    pairs = zip(mean["informative"], sem["informative"], strict=True)
    spread = [f"{value:.3f}" + ("" if np.isnan(error) else f" +- {error:.3f}") for value, error in pairs]
    shown = {"informative": spread}
    columns = [("p (1 - p)", "variance", ".3f"), ("Pearson", "pearson", ".3f")]
    if not mean["pearson"].equals(mean["pearson_unmeasured"]):
        columns.append(("Pearson, unmeasured", "pearson_unmeasured", ".3f"))
    columns += [
        ("Brier", "brier", ".4f"),
        ("ECE", "calibration", ".3f"),
        ("distinct", "distinct", ".2f"),
        ("rolled out", "rollouts", ".4g"),
    ]
    for heading, name, form in columns:
        shown[heading] = ["-" if np.isnan(value) else f"{value:{form}}" for value in mean[name]]
    shown["ms / step"] = [f"{1e3 * value:.1f}" for value in mean["seconds"]]
    table = pd.DataFrame(shown, index=list(mean.index))
    print("\n\n".join([title, table.to_string(), *notes]))


def draw_study(path: Path, title: str, table: pd.DataFrame) -> None:
    """Draw every figure over the visits into a PNG: the mean over seeds, with a band of one standard error."""
    with matplotlib.rc_context({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(13, 8), layout="constrained")
        panels = figure.subplots(2, 3).flatten()
        for axes, (name, heading) in zip(panels, _PANELS.items(), strict=False):
            axes.set_title(heading, loc="left", fontweight="bold")
            for place, (label, rows) in enumerate(table.groupby("selector", sort=False)):
                visits = rows.groupby("visit")[name]
                mean, sem = visits.mean(), visits.sem().fillna(0.0)
                color = "0.5" if label == "oracle" else f"C{place % 10}"
                style = "--" if label == "oracle" else ("-", "-.", ":")[place // 10 % 3]
                if np.isfinite(mean).any():
                    axes.plot(mean.index, mean, style, color=color, label=label, linewidth=1.4)
                    axes.fill_between(mean.index, mean - sem, mean + sem, color=color, alpha=0.2, linewidth=0)
            axes.set_xlabel("visit")
            axes.grid(alpha=0.3)
        handles, labels = panels[0].get_legend_handles_labels()
        panels[-1].axis("off")
        labels = [fill(label, _LABEL_WIDTH) for label in labels]
        # Long labels must not shrink the panels.
        panels[-1].legend(handles, labels, frameon=False, loc="upper left").set_in_layout(False)
        figure.suptitle(title)
        figure.savefig(path, dpi=110)
