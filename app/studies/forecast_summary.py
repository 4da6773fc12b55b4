"""What the replays of a study add up to: one row per selector."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from app.studies.recorded_run import Replay

PER_VISIT = ("informative", "variance", "pearson", "pearson_unmeasured", "brier", "distinct", "rollouts", "seconds")
"""The columns of the table of visits: the fields of `Replay` that are one number per visit."""


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean over seeds with its standard error; None where it is not defined (no forecast; a single seed)."""

    mean: float | None
    sem: float | None

    @classmethod
    def over(cls, values: np.ndarray) -> Estimate:
        """From one value per seed; NaN values are left out."""
        kept = values[np.isfinite(values)]
        if not len(kept):
            return cls(None, None)
        sem = float(kept.std(ddof=1) / np.sqrt(len(kept))) if len(kept) > 1 else None
        return cls(float(kept.mean()), sem)


@dataclass(frozen=True, slots=True)
class Summary:
    """One selector's figures: each is first a mean over the visits of a seed, then over the seeds.

    Attributes:
        informative: share of the chosen prompts with 0 < p < 1.
        variance: p (1 - p) of the chosen prompts.
        pearson: forecast before the rollouts against all recorded rates, over the visits where it is defined.
        pearson_unmeasured: the same without the prompts of that visit's own reference set.
        brier: mean squared error of the same forecast, over the visits where there is one.
        distinct: share of the pool that was chosen at least once by the last visit.
        rollouts_per_step: prompts rolled out, references included.
        seconds_per_step: time spent in the selector; the setup is not in it.
    """

    informative: Estimate
    variance: Estimate
    pearson: Estimate
    pearson_unmeasured: Estimate
    brier: Estimate
    distinct: Estimate
    rollouts_per_step: float
    seconds_per_step: float


def visits_table(replays: Mapping[str, Sequence[Replay]], first: int) -> pd.DataFrame:
    """One row per selector, seed and visit (numbered as in the recorded run, `first` being the first replayed)."""
    frames = []
    for label, runs in replays.items():
        for seed, run in enumerate(runs):
            frame = pd.DataFrame({name: getattr(run, name) for name in PER_VISIT})
            frame.insert(0, "visit", np.arange(first, first + len(frame)))
            frame.insert(0, "seed", seed)
            frame.insert(0, "selector", label)
            frames.append(frame)
    return pd.concat(frames, ignore_index=True)


def summarise(table: pd.DataFrame) -> dict[str, Summary]:
    """The summaries of a `visits_table`, in its order."""
    found = {}
    for label, rows in table.groupby("selector", sort=False):
        seeds = rows.groupby("seed")
        means = seeds[list(PER_VISIT)].mean()  # leaves NaN out
        last = seeds["distinct"].last()
        quality = PER_VISIT[:5]
        found[str(label)] = Summary(
            **{name: Estimate.over(means[name].to_numpy()) for name in quality},
            distinct=Estimate.over(last.to_numpy()),
            rollouts_per_step=float(means["rollouts"].mean()),
            seconds_per_step=float(means["seconds"].mean()),
        )
    return found


def write_json(path: Path, summaries: dict[str, Summary]) -> None:
    """Writes `{selector: {"informative": {"mean", "sem"}, "variance", "pearson", "brier", "distinct",
    "rollouts_per_step", "seconds_per_step", ...}}`; the other figures' standard errors are under `sem`, what is not
    defined is null."""
    content = {}
    for label, summary in summaries.items():
        figures = asdict(summary)
        others = {name: value for name, value in figures.items() if isinstance(value, dict) and name != "informative"}
        content[label] = (
            figures
            | {name: value["mean"] for name, value in others.items()}
            | {"sem": {name: value["sem"] for name, value in others.items()}}
        )
    path.write_text(json.dumps(content, indent=2, allow_nan=False) + "\n")
