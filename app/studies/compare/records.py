"""Results of finished runs, read from their summaries and metrics."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from app.reporting.curves import read_scalars
from app.runs.record import Curve
from app.runs.summary import RunSummary
from app.studies.compare.reach import Course
from app.studies.compare.request import Request
from app.studies.compare.run_folder import RunFolder
from app.studies.compare.settings import Settings, differences
from datamodules.errors import UserError


@dataclass(frozen=True, slots=True, eq=False)
class Record:
    """A finished run; `curves` are steps and values of every metric, `version` is the folder they were read from."""

    arm: str
    seed: int
    summary: RunSummary
    course: Course
    curves: Mapping[str, Curve]
    machine: Mapping[str, str]
    version: Path


@dataclass(frozen=True, slots=True, eq=False)
class Comparison:
    """The finished runs of a comparison, in the order of arms and seeds.

    Attributes:
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
            summary = folder.summary()
            if summary is None:
                missing.append(f"{arm.name} seed {seed}")
                continue
            if not summary.evaluations:
                raise UserError(f"{folder.version}: summary.json has no evaluations. Run it again with evaluations.")
            machine, curves = started_with.get("machine", {}), read_scalars(folder.version)
            record = Record(arm.name, seed, summary, Course.of(summary), curves, machine, folder.version)
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
