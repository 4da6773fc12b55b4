"""Resolved settings of a run: checks before it starts, and the differences between arms."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import yaml

from app.cli.dots import DotsCLI
from app.studies.compare.request import Arm, Request
from datamodules.errors import UserError

Settings = dict[str, Any]
"""The config of a run as plain values, defaults included."""

_NOT_COMPARED = ("logger", "default_root_dir", "enable_progress_bar")
"""Options of the trainer that say where a run is stored and what it shows."""
_CLASS, _ARGUMENTS = "class_path", "init_args"


class _ParsedFit(DotsCLI):
    """`dots fit` that parses its configs and then stops."""

    settings: Settings

    def instantiate_classes(self) -> None:
        self.settings = yaml.safe_load(self.parser.dump(self.config, skip_none=False))[self.subcommand]
        self.subcommand = None  # LightningCLI runs nothing without one

    def after_instantiate_classes(self) -> None:
        pass


def resolve(request: Request, arm: Arm, seed: int) -> Settings:
    """Return all settings of a run except where it is stored.

    Raises UserError for settings that cannot be compared; errors in the configs exit with one line as in `dots fit`.
    """
    args = ["fit", *(part for config in (*request.base, *arm.files(seed)) for part in ("--config", config))]
    args += ["--seed_everything", str(seed)]
    if request.evaluate_every is not None:
        args += ["--trainer.val_check_interval", str(request.evaluate_every)]
    with warnings.catch_warnings():
        # Lightning warns about arguments given in Python while sys.argv has some.
        warnings.filterwarnings("ignore", message=".*args parameter is intended.*")
        settings = _ParsedFit(args).settings
    for name in _NOT_COMPARED:
        settings["trainer"].pop(name, None)
    _check(request, arm, settings)
    return settings


def training_steps(settings: Settings) -> int:
    """Return the training steps that a run is configured for, of one or more optimizer steps each."""
    return int(settings["trainer"]["max_steps"] // settings["model"][_ARGUMENTS].get("mini_batches", 1))


def _check(request: Request, arm: Arm, settings: Settings) -> None:
    interval, max_steps = settings["trainer"]["val_check_interval"], settings["trainer"]["max_steps"]
    if max_steps < 1:
        raise UserError(f"arm {arm.name}: trainer.max_steps is {max_steps}. Give the steps of a run.")
    steps = training_steps(settings)
    if not isinstance(interval, int) or steps < interval:
        raise UserError(
            f"arm {arm.name}: trainer.val_check_interval is {interval} in a run of {steps} steps, expected a number of "
            f"steps up to {steps}. Give --evaluate_every."
        )
    if steps % interval and not request.budget.clocked(arm.name == request.baseline):
        raise UserError(
            f"arm {arm.name}: {steps} steps (trainer.max_steps / mini_batches) are not a multiple of the {interval} "
            "between evaluations, so the end would not be evaluated. Change --evaluate_every."
        )
    schedule = (settings["model"][_ARGUMENTS].get("optimization") or {}).get("schedule", "constant")
    if request.budget.rule != "steps" and schedule not in ("constant", "constant_with_warmup"):
        raise UserError(
            f"arm {arm.name}: model.optimization.schedule is {schedule}, which depends on trainer.max_steps, but the "
            "clock decides when a run ends. Give --budget steps or a constant schedule."
        )


def differences(arm: Settings, baseline: Settings) -> list[str]:
    """Return `name: baseline's value -> arm's value` for every setting that differs.

    A class that is replaced, added or removed is one line with its arguments, except those that are null. Callbacks are
    matched by class, so that an additional one does not shift the others.
    """
    return list(_differences("", _by_name(baseline), _by_name(arm)))


def _by_name(settings: Settings) -> Settings:
    callbacks = {_short(one[_CLASS]): one for one in settings["trainer"].get("callbacks") or []}
    rest = {name: value for name, value in settings.items() if name not in ("trainer", "seed_everything")}
    return rest | {"trainer": settings["trainer"] | {"callbacks": None}, "callbacks": callbacks}


def _differences(path: str, before: Any, now: Any) -> Iterator[str]:
    if before == now:
        return
    both = isinstance(before, Mapping) and isinstance(now, Mapping)
    if both and before.get(_CLASS) == now.get(_CLASS):
        if _CLASS in before:
            before, now = before.get(_ARGUMENTS) or {}, now.get(_ARGUMENTS) or {}
        for name in {**before, **now}:
            yield from _differences(f"{path}.{name}" if path else name, before.get(name), now.get(name))
    else:
        yield f"{path}: {_shown(before)} -> {_shown(now)}"


def _shown(value: Any) -> str:
    if isinstance(value, Mapping) and _CLASS in value:
        given = (value.get(_ARGUMENTS) or {}).items()
        arguments = ", ".join(f"{name}={_shown(each)}" for name, each in given if each is not None)
        return f"{_short(value[_CLASS])}({arguments})"
    return "none" if value is None else str(value)


def _short(class_path: str) -> str:
    return class_path.rpartition(".")[2]
