"""What a run of a comparison is made of: its resolved config."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import yaml

from app.cli.dots import DotsCLI
from app.studies.compare.request import Arm, Request
from datamodules.errors import UserError

Settings = dict[str, Any]
_NOT_COMPARED = ("logger", "default_root_dir", "enable_progress_bar")
"""Of the trainer: where a run stands and what it shows."""


class _Resolved(DotsCLI):
    """`dots fit` up to the point where classes would be made."""

    def instantiate_classes(self) -> None:
        pass

    def after_instantiate_classes(self) -> None:
        pass

    def _run_subcommand(self, subcommand: str) -> None:
        pass

    @property
    def settings(self) -> Settings:
        config = self.config[self.subcommand]
        found: Settings = yaml.safe_load(self._parser(self.subcommand).dump(config, skip_none=False))
        return found


def resolve(request: Request, arm: Arm, seed: int) -> Settings:
    """All settings of a run, defaults included, but where it stands. Ends with one line where they are wrong."""
    args = ["fit"]
    for config in (*request.base, *arm.files(seed)):
        args += ["--config", config]
    args += ["--seed_everything", str(seed)]
    if request.evaluate_every is not None:
        args += ["--trainer.val_check_interval", str(request.evaluate_every)]
    with warnings.catch_warnings():
        # Lightning warns of arguments given in Python while there are some on the command line.
        warnings.filterwarnings("ignore", message=".*args parameter is intended.*")
        settings = _Resolved(args).settings
    for name in _NOT_COMPARED:
        settings["trainer"].pop(name, None)
    _check(request, arm, settings)
    return settings


def asked(request: Request, arm: Arm, settings: Settings) -> dict[str, Any]:
    """All that decides what a run will do, as plain values."""
    return {"settings": settings, "budget": asdict(request.budget), "is_baseline": arm.name == request.baseline}


def digest(content: Mapping[str, Any]) -> str:
    """SHA-256 of plain values."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def max_steps(settings: Settings) -> int:
    """Optimizer steps that a run is configured for."""
    return int(settings["trainer"]["max_steps"])


def _check(request: Request, arm: Arm, settings: Settings) -> None:
    trainer = settings["trainer"]
    if max_steps(settings) < 1:
        raise UserError(f"arm {arm.name}: trainer.max_steps={max_steps(settings)}, expected the steps of a run")
    names = [callback["class_path"].rpartition(".")[2] for callback in trainer.get("callbacks") or []]
    if missing := [name for name in ("RunLedger", "RunCheckpoint") if name not in names]:
        raise UserError(
            f"arm {arm.name}: trainer.callbacks holds no callbacks.{missing[0]}: add it, a comparison reads its files"
        )
    interval, batches = trainer["val_check_interval"], max_steps(settings) // _updates(settings)
    if not isinstance(interval, int) or batches < interval:
        raise UserError(
            f"arm {arm.name}: evaluated every {interval} of {batches} steps (trainer.val_check_interval), expected a "
            f"number of steps up to {batches}: give --evaluate_every"
        )
    if batches % interval and not request.budget.clocked(arm.name == request.baseline):
        raise UserError(
            f"arm {arm.name}: {batches} steps (trainer.max_steps / mini_batches) are no multiple of the {interval} "
            "between evaluations, so its end would not be evaluated: change --evaluate_every"
        )
    schedule = (settings["model"]["init_args"].get("optimization") or {}).get("schedule", "constant")
    if request.budget.rule != "steps" and schedule not in ("constant", "constant_with_warmup"):
        raise UserError(
            f"arm {arm.name}: model.optimization.schedule={schedule} goes by trainer.max_steps, which a run under a "
            "clock does not know: give --budget steps, or a constant schedule"
        )


def _updates(settings: Settings) -> int:
    """Optimizer steps in a training step."""
    return int(settings["model"]["init_args"].get("mini_batches", 1))
