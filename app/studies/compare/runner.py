"""Makes the runs of a comparison, one after the other."""

from __future__ import annotations

import math
import signal
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from app.studies.compare.meter import Meter
from app.studies.compare.process import only_one, run_fit
from app.studies.compare.request import Arm, Request, run_folder_of
from app.studies.compare.settings import Settings, asked, max_steps
from app.studies.compare.state import account_of, check_unchanged, clear_unsaved, note_asked
from datamodules.errors import UserError

LOG, OVERLAY = "log.txt", "run.yaml"
_SHOWN = 300


def run_all(request: Request, out: Path, settings: Mapping[tuple[str, int], Settings]) -> None:
    """Makes every run that is not finished; a run that was stopped goes on from its last checkpoint.

    Raises UserError, before anything runs, when a run that has begun was asked for otherwise; and when a run fails.
    """
    runs = request.runs()
    with only_one(out) as lock, _terminable(), Meter(len(runs)) as meter:
        for arm, seed in runs:
            check_unchanged(run_folder_of(out, arm.name, seed), asked(request, arm, settings[arm.name, seed]))
        request.save(out)
        accounts = {(arm.name, seed): account_of(run_folder_of(out, arm.name, seed)) for arm, seed in runs}
        for (name, _), account in accounts.items():
            if account is not None:
                meter.known(name, account["seconds"]["total"])
        open_runs = [(arm, seed) for arm, seed in runs if accounts[arm.name, seed] is None]
        for place, (arm, seed) in enumerate(open_runs):
            folder = run_folder_of(out, arm.name, seed)
            note_asked(folder, asked(request, arm, settings[arm.name, seed]))
            arguments = _prepare(request, arm, seed, out, settings[arm.name, seed])
            meter.begin(arm.name, seed, [later.name for later, _ in open_runs[place + 1 :]], folder / LOG)
            code = run_fit(arguments, folder / LOG, lock, meter.tick)
            meter.end(_outcome(folder, arm, seed, code))


def overlay(request: Request, arm: Arm, seed: int, folder: Path, settings: Settings, clock_s: float | None) -> Any:
    """The last config of a run: its place, its seed, when it is evaluated and when it ends.

    Args:
        request: the comparison.
        arm: of the run.
        seed: of the run.
        folder: of the run.
        settings: those of the arm.
        clock_s: seconds of the training clock at which it ends; None for `trainer.max_steps`.
    """
    logger = {"save_dir": str(folder.parent), "name": folder.name, "default_hp_metric": False}
    trainer: dict[str, Any] = {
        "logger": {"class_path": "lightning.pytorch.loggers.TensorBoardLogger", "init_args": logger},
        "val_check_interval": settings["trainer"]["val_check_interval"],
    }
    if clock_s is not None:
        trainer["max_steps"] = math.ceil(request.budget.step_limit * max_steps(settings))
        trainer["callbacks+"] = [{"class_path": "callbacks.ClockBudget", "init_args": {"seconds": clock_s}}]
    return {"seed_everything": seed, "trainer": trainer}


def _prepare(request: Request, arm: Arm, seed: int, out: Path, settings: Settings) -> list[str]:
    """Writes the overlay of a run and gives the arguments of `dots` that make it or go on with it."""
    folder = run_folder_of(out, arm.name, seed)
    clear_unsaved(folder)
    content = overlay(request, arm, seed, folder, settings, _clock(request, arm, seed, out))
    (folder / OVERLAY).write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
    configs = (*request.base, *arm.files(seed), str(folder / OVERLAY))
    return ["fit", *(part for config in configs for part in ("--config", config)), "--ckpt_path", "last"]


def _clock(request: Request, arm: Arm, seed: int, out: Path) -> float | None:
    if not request.budget.clocked(arm.name == request.baseline):
        return None
    if request.budget.rule == "seconds":
        return request.budget.seconds
    account = account_of(run_folder_of(out, request.baseline, seed))
    assert account is not None, "the baseline's run stands first in its seed"
    return float(account["training_seconds"])


def _outcome(folder: Path, arm: Arm, seed: int, code: int) -> str:
    """What a run ended with, in words. Raises UserError when it did not end as it was meant to."""
    account = account_of(folder)
    if code or account is None:
        raise UserError(
            f"the run of arm {arm.name} with seed {seed} ended with exit status {code}: {_last_line(folder / LOG)} "
            f"(all of it: {folder / LOG}); mend that, and the same command goes on"
        )
    last = account["evaluations"][-1]["accuracy"] if account["evaluations"] else float("nan")
    return f"{account['steps']} steps, {account['training_seconds']:.0f} s of training, accuracy {last:.3f}"


def _last_line(log: Path) -> str:
    """What a run said last; of its own error lines the last one."""
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("dots: error: ")]
    return (errors or lines or ["it said nothing"])[-1][:_SHOWN]


@contextmanager
def _terminable() -> Iterator[None]:
    """SIGTERM ends the comparison as Ctrl-C does: the run at work saves first."""

    def stop(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
