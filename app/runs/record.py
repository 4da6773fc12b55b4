"""The run's own record of its metrics, kept whatever the loggers."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities.rank_zero import rank_zero_only

METRICS = "metrics.jsonl"
HISTOGRAMS = "histograms.jsonl"
Curve = tuple[list[int], list[float]]


class RunRecord(Logger):
    """Writes every logged scalar to `metrics.jsonl` in the run's folder, and histograms to `histograms.jsonl`.

    The trainer adds it to the user's loggers, so that what Lightning and callbacks log reaches it too. A line is
    `{"step": 3, "reward": 0.5, ...}`; a step may have several. Values that are not finite are left out.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder

    @property
    def save_dir(self) -> str:
        return str(self.folder.parent.parent)

    @property
    def name(self) -> str:
        return self.folder.parent.name

    @property
    def version(self) -> str:
        return self.folder.name

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        values = {name: float(value) for name, value in metrics.items()}
        self._append(METRICS, step, {name: value for name, value in values.items() if math.isfinite(value)})

    @rank_zero_only
    def log_histogram(self, name: str, counts: Sequence[int], edges: Sequence[float], step: int) -> None:
        """Append a histogram: `N` counts and `N + 1` edges of bins."""
        self._append(HISTOGRAMS, step, {"name": name, "counts": list(counts), "edges": list(edges)})

    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """Do nothing: the run's folder has its config.yaml."""

    def keep(self, steps: int) -> None:
        """Drop what was written of later steps than the first `steps`: a resumed run repeats them."""
        for name in (METRICS, HISTOGRAMS):
            file = self.folder / name
            if not file.exists():
                continue
            kept = "".join(json.dumps(row) + "\n" for row in rows_of(file) if row["step"] < steps)
            temporary = file.with_name(f".{name}.tmp")
            temporary.write_text(kept, encoding="utf-8")
            os.replace(temporary, file)

    def _append(self, name: str, step: int | None, values: Mapping[str, Any]) -> None:
        if values:
            with (self.folder / name).open("a", encoding="utf-8") as file:
                file.write(json.dumps({"step": step or 0, **values}) + "\n")


def rows_of(file: Path) -> Iterator[dict[str, Any]]:
    """Yield the lines of a record; the last one is left out if a kill has cut it."""
    with file.open(encoding="utf-8") as lines:
        for line in lines:
            if line.endswith("\n"):
                yield json.loads(line)


def read_record(folder: Path) -> dict[str, Curve]:
    """Return steps and values of every metric in the `metrics.jsonl` of a folder; a step counts once, the last time."""
    points: dict[str, dict[int, float]] = {}
    for row in rows_of(folder / METRICS):
        step = row.pop("step")
        for name, value in row.items():
            points.setdefault(name, {})[step] = value
    return {name: (sorted(of), [of[step] for step in sorted(of)]) for name, of in points.items()}
