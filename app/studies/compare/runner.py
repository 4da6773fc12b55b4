"""Training of the runs, one `dots fit` process after the other."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path

import yaml
from rich.console import Console
from rich.progress import Progress, TimeElapsedColumn
from tensorboard.backend.event_processing.directory_watcher import DirectoryDeletedError
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from app.studies.compare.process import fit, only_one
from app.studies.compare.request import Request
from app.studies.compare.run_folder import RunFolder
from app.studies.compare.settings import Settings, training_steps
from datamodules.errors import UserError

_CLOCK = "time/training"
_LINES_SHOWN = 10


def run_all(request: Request, out: Path, settings: Mapping[tuple[str, int], Settings]) -> None:
    """Train every run that is not finished; a run that was stopped resumes from its last checkpoint.

    Raises UserError before anything runs when a run was started with other settings, and when a run fails.
    """
    runs = [(arm, seed, RunFolder.of(out, arm.name, seed)) for arm, seed in request.runs()]
    console = Console(stderr=True)
    # The estimate of the time left looks back over hours: some arms are slower than others.
    columns = (*Progress.get_default_columns(), TimeElapsedColumn())
    bar = Progress(*columns, console=console, disable=not console.is_terminal, speed_estimate_period=1e5)
    with only_one(out) as lock, bar:
        for arm, seed, folder in runs:
            folder.check(request, arm, settings[arm.name, seed])
        request.save(out)
        waiting = [run for run in runs if run[2].summary() is None]
        task = bar.add_task("", total=len(runs), completed=len(runs) - len(waiting))
        for done, (arm, seed, folder) in enumerate(waiting, len(runs) - len(waiting)):
            label, own = f"{arm.name} seed {seed}", settings[arm.name, seed]
            folder.prepare(request, arm, own)
            clock_s = None
            if request.budget.clocked(arm.name == request.baseline):
                clock_s = request.budget.seconds
                if clock_s is None:
                    baseline = RunFolder.of(out, request.baseline, seed).summary()
                    assert baseline is not None  # the baseline comes first for every seed
                    clock_s = baseline.training_seconds
            last_config = folder.path / "run.yaml"
            last_config.write_text(yaml.safe_dump(overlay(request, seed, folder, own, clock_s), sort_keys=False))
            share = RunProgress(folder.version, training_steps(own), clock_s)

            def show(label: str = label, done: int = done, share: RunProgress = share) -> None:
                part = share.read()
                bar.update(task, description=f"{label} {part:.0%}", completed=done + part)

            configs = (*request.base, *arm.files(seed), str(last_config))
            started = time.monotonic()
            code = fit([part for config in configs for part in ("--config", config)], folder.log, lock, show)
            summary = folder.summary()
            if code or summary is None:
                lines = [line for line in folder.log.read_text(errors="replace").splitlines() if line.strip()]
                console.print(*lines[-_LINES_SHOWN:], sep="\n", markup=False, highlight=False, soft_wrap=True)
                raise UserError(
                    f"The run of arm {arm.name} with seed {seed} ended with exit status {code} before it was complete: "
                    f"{(lines or ['no output'])[-1].strip()} (all output: {folder.log}). Fix the cause and repeat the "
                    "same command to continue."
                )
            bar.update(task, completed=done + 1)
            left = bar.tasks[task].time_remaining
            line = (
                f"{label}: {summary.steps} steps, {summary.training_seconds:.0f} s of training, accuracy "
                f"{summary.val.get('last', math.nan):.3f}, {timedelta(seconds=round(time.monotonic() - started))}"
                + ("" if left is None else f"; about {timedelta(seconds=round(left))} left")
            )
            console.print(line, highlight=False, soft_wrap=True)


def overlay(request: Request, seed: int, folder: RunFolder, settings: Settings, clock_s: float | None) -> Settings:
    """Return the last config of a run: its folder, its seed, when it is evaluated and when it ends.

    It ends after `clock_s` seconds of the training clock, or at `trainer.max_steps` where that is None.
    """
    logger = {"save_dir": str(folder.path.parent), "name": folder.path.name, "version": 0, "default_hp_metric": False}
    trainer: Settings = {
        "logger": {"class_path": "lightning.pytorch.loggers.TensorBoardLogger", "init_args": logger},
        "val_check_interval": settings["trainer"]["val_check_interval"],
    }
    if clock_s is not None:
        trainer["max_steps"] = math.ceil(request.budget.step_limit * settings["trainer"]["max_steps"])
        trainer["callbacks+"] = [{"class_path": "callbacks.ClockBudget", "init_args": {"seconds": clock_s}}]
    return {"seed_everything": seed, "trainer": trainer}


class RunProgress:
    """Progress of a run, read from its TensorBoard events while they are written.

    The run ends after `clock_s` seconds of the training clock, or where that is None after `steps`.
    """

    def __init__(self, version: Path, steps: int, clock_s: float | None) -> None:
        self._version, self._steps, self._clock_s = version, steps, clock_s
        self._events = EventAccumulator(str(version), size_guidance={"scalars": 1}, purge_orphaned_data=False)

    def read(self) -> float:
        """Return the share of the run that is done, in [0, 1]."""
        if not self._version.exists():
            return 0.0
        try:
            self._events.Reload()
        except DirectoryDeletedError:  # a starting run creates its folder once to check that it can, and removes it
            return 0.0
        if _CLOCK not in self._events.Tags()["scalars"]:
            return 0.0
        last = self._events.Scalars(_CLOCK)[-1]
        share = (last.step + 1) / self._steps if self._clock_s is None else last.value / self._clock_s
        return min(1.0, float(share))
