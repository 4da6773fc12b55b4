"""The table, the JSON file and the picture of a study of worth."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from app.studies.worth.study import Cell
from callbacks.algorithm.replay_worth import Cost, ratio

COLUMNS = (
    "learning_rate", "uses", "age", "seeds", "groups", "worth", "worth_error", "gradients", "gradients_error",
    "sketches", "sketches_error", "drift", "effective", "gain_fresh", "gain_more_fresh", "threshold",
)  # fmt: skip


def threshold(cost: dict[str, float], seconds_per_token: float = 0.0) -> float:
    """Return the worth above which a replayed group saves time; see `Cost.threshold`.

    Args:
        cost: sums over steps; see `study.measure`.
        seconds_per_token: added to the rollouts for every token, where generation is dearer than on this machine.
    """
    generating = cost["rollout_seconds"] + seconds_per_token * cost["tokens"]
    return Cost(generating, cost["fresh"], cost["informative"], cost["update_seconds"], cost["updated"]).threshold()


def table_of(cells: Sequence[Cell], seconds_per_token: float) -> pd.DataFrame:
    """Return a row per learning rate, uses and age, with `COLUMNS`; figures are pooled over the seeds.

    `worth` is the ratio of sums over seeds and draws: the gain that replayed groups add to a step, over that of as many
    fresh ones. `*_error` are jackknife standard errors over the seeds, NaN with one seed.
    """
    found: dict[tuple[float, int, int], list[tuple[Cell, dict[str, Any]]]] = {}
    for cell in cells:
        for row in cell["rows"]:
            found.setdefault((cell["learning_rate"], row["uses"], row["age"]), []).append((cell, row))
    rows = []
    for (rate, uses, age), measured in sorted(found.items(), key=lambda one: (-one[0][0], *one[0][1:])):
        walks = [cell for cell in cells if cell["learning_rate"] == rate and cell["uses"] == 1] or [
            cell for cell, _ in measured
        ]
        cost = {name: sum(cell["cost"][name] for cell in walks) for name in walks[0]["cost"]}
        pairs = {
            "worth": [_added(row["gains"]) for _, row in measured],
            "gradients": [row["adam"] for _, row in measured],
            "sketches": [row["sketch"] for _, row in measured],
        }
        row = {"learning_rate": rate, "uses": uses, "age": age, "seeds": len(measured)}
        for name, its in pairs.items():
            row[name], row[f"{name}_error"] = ratio(its)
        gains = [gain for _, its in measured for gain in its["gains"]]
        row |= {
            "groups": float(np.mean([its["groups"] for _, its in measured])),
            "drift": float(np.mean([its["drift"] for _, its in measured])),
            "effective": float(np.mean([its["effective"] for _, its in measured])),
            "gain_fresh": float(np.mean([gain["fresh"][0] for gain in gains])),
            "gain_more_fresh": float(np.mean([gain["with_fresh"][0] for gain in gains])),
            "threshold": threshold(cost, seconds_per_token),
        }
        rows.append(row)
    return pd.DataFrame(rows, columns=list(COLUMNS))


def _added(gains: Sequence[dict[str, list[float]]]) -> list[float]:
    """Return what replayed and what fresh groups add to the gain, means over draws."""
    return [
        float(np.mean([one[name][0] - one["fresh"][0] for one in gains])) for name in ("with_replayed", "with_fresh")
    ]


def check_of(cells: Sequence[Cell]) -> str | None:
    """Return a line that compares the estimated gains with those of new completions; None if none were sampled."""
    steps = [
        gain for cell in cells for row in cell["rows"] for one in row["gains"] for gain in one.values() if len(gain) > 1
    ]
    if not steps:
        return None
    estimated, sampled = np.array(steps).T
    error = sampled.std(ddof=1) / math.sqrt(len(steps))
    return (
        f"Check: over {len(steps)} steps the mean gain is {estimated.mean():.4f} by importance weighting and "
        f"{sampled.mean():.4f} +- {error:.4f} by new completions of the same seeds."
    )


def write(out: Path, cells: Sequence[Cell], seconds_per_token: float) -> str:
    """Write `worth.json`, `worth.csv` and `worth.png`, and return the table as text."""
    table = table_of(cells, seconds_per_token)
    table.to_csv(out / "worth.csv", index=False)
    plain = table.astype(object).where(table.notna(), None)
    content = {"seconds_per_token": seconds_per_token, "rows": plain.to_dict("records"), "cells": list(cells)}
    (out / "worth.json").write_text(json.dumps(content, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    draw(out / "worth.png", table)

    def with_error(name: str) -> list[str]:
        pairs = zip(table[name], table[f"{name}_error"], strict=True)
        return [_number(value) + ("" if math.isnan(error) else f" +- {error:.2f}") for value, error in pairs]

    shown = pd.DataFrame(
        {
            "learning rate": [f"{one:g}" for one in table["learning_rate"]],
            "uses": table["uses"],
            "age": table["age"],
            "worth": with_error("worth"),
            "by gradients": with_error("gradients"),
            "by sketches": with_error("sketches"),
            "drift": [f"{one:.3f}" for one in table["drift"]],
            "pays above": [_number(one) for one in table["threshold"]],
        }
    )
    return shown.to_string(index=False)


def _number(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.2f}"


def draw(path: Path, table: pd.DataFrame) -> None:
    """Draw worth over age into a PNG: a panel per learning rate, a colour per number of uses."""
    rates = list(dict.fromkeys(table["learning_rate"]))
    with matplotlib.rc_context({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(4.4 * max(1, len(rates)), 3.6), layout="constrained")
        panels = figure.subplots(1, max(1, len(rates)), sharey=True, squeeze=False)[0]
        for axes, rate in zip(panels, rates, strict=False):
            its = table[table["learning_rate"] == rate]
            axes.set_title(f"learning rate {rate:g}", loc="left", fontweight="bold")
            for place, (uses, rows) in enumerate(its.groupby("uses")):
                label = {0: "never used", 1: "used once"}.get(int(uses), f"used {uses} times")
                errors = {name: rows[f"{name}_error"].fillna(0.0) for name in ("worth", "gradients")}
                axes.errorbar(
                    rows["age"], rows["worth"], errors["worth"], color=f"C{place}", marker="o", capsize=2, label=label
                )
                axes.errorbar(
                    rows["age"],
                    rows["gradients"],
                    errors["gradients"],
                    color=f"C{place}",
                    ls="--",
                    capsize=2,
                    alpha=0.6,
                )
            axes.axhline(float(its["threshold"].iloc[0]), color="0.4", lw=0.9, ls=":", label="pays above")
            axes.axhline(0, color="0.8", lw=0.8, zorder=0)
            axes.set_xlabel("age in steps")
        panels[0].set_ylabel("worth of a replayed group")
        panels[0].legend(frameon=False)
        figure.supxlabel("Solid: gain in held-out success. Dashed: agreement of gradients.", fontsize=8)
        figure.savefig(path, dpi=110)
