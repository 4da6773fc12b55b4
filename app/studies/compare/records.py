"""What a finished run has to say in a comparison, read from its own account and metrics."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from app.reporting.curves import Curve, read_scalars
from app.studies.compare.differences import differences
from app.studies.compare.reach import Course
from app.studies.compare.request import Request, run_folder_of
from app.studies.compare.state import account_of, asked_of, machine_of, version_of
from datamodules.errors import UserError

CLOCK = "time/training"
MEASURED = (
    CLOCK,
    "num_completions",
    "num_tokens",
    "selection/informative_fraction",
    "selection/fresh_informative_fraction",
    "selection/forecast_pearson",
    "selection/forecast_brier",
    "difficulty/reference_pearson",
    "tokens_per_second",
)
"""The metrics that are kept of a run, by name."""

_EVALUATION = {"time": "seconds", "completions": "completions", "tokens": "completion_tokens", "steps": "step"}
"""Where the account of a run holds the costs of an evaluation."""


@dataclass(frozen=True, slots=True, eq=False)
class Record:
    """A finished run.

    Attributes:
        arm: its name.
        seed: of the run.
        course: its evaluations.
        account: its `summary.json`.
        curves: steps and values of `MEASURED`, where it logged them.
        machine: what it was made on.
        folder: where its account, metrics and completions lie.
    """

    arm: str
    seed: int
    course: Course
    account: Mapping[str, Any]
    curves: Mapping[str, Curve]
    machine: Mapping[str, str]
    folder: Path


@dataclass(frozen=True, slots=True, eq=False)
class Comparison:
    """All that is finished of a comparison.

    Attributes:
        request: what was asked for.
        records: in the order of arms and seeds.
        missing: "ARM seed SEED" of the runs that are not finished.
        differences: by arm: in what its settings differ from the baseline's.
    """

    request: Request
    records: Sequence[Record]
    missing: Sequence[str]
    differences: Mapping[str, Sequence[str]]

    def of(self, arm: str) -> list[Record]:
        """The runs of an arm, by seed."""
        return [record for record in self.records if record.arm == arm]

    def baseline_of(self, record: Record) -> Record | None:
        """The baseline's run with the same seed."""
        return next((one for one in self.of(self.request.baseline) if one.seed == record.seed), None)


def read_comparison(request: Request, out: Path) -> Comparison:
    """Reads what is finished.

    Raises UserError when nothing is, or when two runs of a seed were evaluated on different prompts.
    """
    found, missing = [], []
    for arm in request.arms:
        for seed in request.seeds:
            record = _read(arm.name, seed, run_folder_of(out, arm.name, seed))
            if record is None:
                missing.append(f"{arm.name} seed {seed}")
            else:
                found.append(record)
    if not found:
        raise UserError(f"{out}: none of its {len(missing)} runs is finished; run the comparison first")
    check_same_prompts(found)
    return Comparison(request, found, missing, _differences(request, out))


def course_of(account: Mapping[str, Any]) -> Course:
    """The evaluations in a run's `summary.json`."""
    evaluations = account["evaluations"]
    costs = {name: np.array([one[key] for one in evaluations], dtype=float) for name, key in _EVALUATION.items()}
    return Course(np.array([one["accuracy"] for one in evaluations], dtype=float), costs)


def check_same_prompts(records: Sequence[Record]) -> None:
    """Raises UserError unless all runs of a seed were evaluated on the same prompts."""
    first: dict[int, Record] = {}
    for record in records:
        other = first.setdefault(record.seed, record)
        if record.account["validation_prompts"] != other.account["validation_prompts"]:
            raise UserError(
                f"{other.arm} and {record.arm} were evaluated on different prompts with seed {record.seed}, so their "
                "accuracies cannot be compared: give both the same data.val, or a subset made with that very seed"
            )


def _read(arm: str, seed: int, folder: Path) -> Record | None:
    account, version = account_of(folder), version_of(folder)
    if account is None or version is None:
        return None
    if not account.get("evaluations"):
        raise UserError(f"{version}: its summary.json holds no evaluations; expected a run of this version with any")
    scalars = read_scalars(version)
    curves = {name: scalars[name] for name in MEASURED if name in scalars}
    return Record(arm, seed, course_of(account), account, curves, machine_of(folder), version)


def _differences(request: Request, out: Path) -> dict[str, Sequence[str]]:
    def settings(arm: str) -> Mapping[str, Any] | None:
        folders = (run_folder_of(out, arm, seed) for seed in request.seeds)
        found = (asked_of(folder).get("settings") for folder in folders)
        return next((one for one in found if one), None)

    baseline = settings(request.baseline)
    named = {arm.name: settings(arm.name) for arm in request.arms}
    return {
        name: differences(own, baseline) for name, own in named.items() if own and baseline and name != request.baseline
    }
