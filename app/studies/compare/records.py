"""Results of finished runs, read from their summaries and metrics."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from app.reporting.curves import Curve, read_scalars
from app.studies.compare.reach import Course
from app.studies.compare.request import Request
from app.studies.compare.run_folder import RunFolder
from app.studies.compare.settings import Settings, differences
from datamodules.errors import UserError

CLOCK = "time/training"
_COSTS = {"time": "seconds", "completions": "completions", "tokens": "completion_tokens", "steps": "step"}
"""Fields of an evaluation in `summary.json` by the name of the cost."""


@dataclass(frozen=True, slots=True, eq=False)
class Summary:
    """Content of the `summary.json` of a completed run: seconds by phase, counts, and the course of evaluations."""

    steps: int
    training_seconds: float
    seconds: Mapping[str, float]
    informative_fraction: float
    reference_completions: int
    discarded_completions: int
    replayed_groups: int
    validation_prompts: str | None
    course: Course


def read_summary(version: Path) -> Summary | None:
    """Read the `summary.json` of a run; None unless it says that the run is complete."""
    try:
        saved = json.loads((version / "summary.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    if not isinstance(saved, dict) or saved.get("completed") is not True:
        return None
    evaluations = saved["evaluations"]
    costs = {cost: np.array([one[field] for one in evaluations], dtype=float) for cost, field in _COSTS.items()}
    return Summary(
        steps=saved["steps"],
        training_seconds=saved["training_seconds"],
        seconds=saved["seconds"],
        informative_fraction=saved["informative_fraction"],
        reference_completions=saved["reference"]["completions"],
        discarded_completions=saved["discarded"]["completions"],
        replayed_groups=saved["replayed_groups"],
        validation_prompts=saved["validation_prompts"],
        course=Course(np.array([one["accuracy"] for one in evaluations], dtype=float), costs),
    )


@dataclass(frozen=True, slots=True, eq=False)
class Record:
    """A finished run; `curves` are steps and values of every metric, `version` is the folder they were read from."""

    arm: str
    seed: int
    summary: Summary
    curves: Mapping[str, Curve]
    machine: Mapping[str, str]
    version: Path


@dataclass(frozen=True, slots=True, eq=False)
class Comparison:
    """The finished runs of a comparison.

    Attributes:
        request: arms, seeds and budget.
        records: finished runs in the order of arms and seeds.
        missing: "ARM seed SEED" of the runs that are not finished.
        differences: settings in which an arm differs from the baseline, by arm.
    """

    request: Request
    records: Sequence[Record]
    missing: Sequence[str]
    differences: Mapping[str, Sequence[str]]

    def of(self, arm: str) -> list[Record]:
        """Return the runs of an arm by seed."""
        return [record for record in self.records if record.arm == arm]


def read_comparison(request: Request, out: Path) -> Comparison:
    """Read the finished runs.

    Raises UserError when there are none, or when two runs with the same seed were evaluated on different prompts.
    """
    records: list[Record] = []
    missing: list[str] = []
    first: dict[int, Record] = {}
    settings: dict[str, Settings] = {}
    for arm in request.arms:
        for seed in request.seeds:
            folder = RunFolder.of(out, arm.name, seed)
            started_with = folder.started_with()
            if "asked" in started_with:
                settings.setdefault(arm.name, started_with["asked"]["settings"])
            summary = read_summary(folder.version)
            if summary is None:
                missing.append(f"{arm.name} seed {seed}")
                continue
            if not len(summary.course.accuracy):
                raise UserError(f"{folder.version}: summary.json has no evaluations. Run it again with evaluations.")
            machine = started_with.get("machine", {})
            record = Record(arm.name, seed, summary, read_scalars(folder.version), machine, folder.version)
            other = first.setdefault(seed, record)
            if summary.validation_prompts != other.summary.validation_prompts:
                raise UserError(
                    f"{other.arm} and {arm.name} were evaluated on different prompts with seed {seed}, so their "
                    "accuracies cannot be compared. Give both the same data.val, or a subset made with that seed."
                )
            records.append(record)
    if not records:
        raise UserError(f"{out}: none of its {len(missing)} runs is finished. Run the comparison first.")
    baseline = settings.pop(request.baseline, None)
    named = {name: differences(own, baseline) for name, own in settings.items()} if baseline else {}
    return Comparison(request, records, missing, named)
