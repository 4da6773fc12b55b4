"""The command `dots worth`: options, walks, report."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

from jsonargparse import Namespace
from lightning.pytorch import Trainer

from app.cli.commands import command_parser
from app.cli.dots import DotsCLI
from app.cli.parsing import DotsArgumentParser
from app.module import GRPOModule
from app.runs import checkpoint_files
from app.runs.folder import checkpoint_of
from app.studies.worth.report import check_of, write
from app.studies.worth.study import Cell, Plan, measure
from app.studies.worth.walk import Walker
from app.subsets.measurements import claim_folder, write_whole
from app.subsets.warmup import load_policy
from datamodules.errors import UserError
from datamodules.online import OnlinePromptDataModule
from datamodules.selectors import Uniform

_DESCRIPTION = (
    "Measures what a replayed group is worth: from one checkpoint, the gain in held-out success of a step on fresh "
    "groups, with replayed groups added, and with as many more fresh ones. Repeat the same command to continue a study "
    "that was stopped. For example: dots worth --base configs/quickstart.yaml configs/settings/words_and_sums.yaml "
    "configs/settings/small_steps.yaml --out worth"
)
_USES = (
    "updates that a group has been in: 0 never, 1 in its own step, 2 in the next one too, ...; ages below it are left "
    "out"
)


def main(args: list[str]) -> None:
    """Run `dots worth` with the arguments that follow it."""
    options = worth_parser().parse_args(args)
    plan, out = read_plan(options), Path(options.out).expanduser()
    checkpoint = None if options.ckpt_path is None else checkpoint_of(Path(options.ckpt_path))
    built = BuiltRun(options.base)
    module, data = built.model, built.datamodule
    if not isinstance(module, GRPOModule) or not isinstance(data, OnlinePromptDataModule):
        raise UserError("--base is not the config of a GRPO run. Give one that dots fit trains with.")
    if built.trainer.world_size > 1:
        raise UserError(f"dots worth runs in one process, not in {built.trainer.world_size}. Set trainer.devices: 1.")
    if module.environment is not None:
        raise UserError("dots worth measures single turns, but model.environment is set. Set it to null.")
    claim_folder(out, _settings(built, plan, checkpoint), "dots worth")
    (out / "cells").mkdir(exist_ok=True)
    todo = [one for one in plan.cells() if not _file(out, one).is_file()]
    if todo:
        _measure(built.trainer, module, data, plan, checkpoint, out, todo)
    cells: list[Cell] = [json.loads(_file(out, one).read_text(encoding="utf-8")) for one in plan.cells()]
    print(write(out, cells, options.seconds_per_token))
    if (check := check_of(cells)) is not None:
        print(check)
    print(f"report: {out / 'worth.png'}")


def _measure(
    trainer: Trainer,
    module: GRPOModule,
    data: OnlinePromptDataModule,
    plan: Plan,
    checkpoint: Path | None,
    out: Path,
    todo: list[tuple[float, int, int]],
) -> None:
    """Measure the cells that have no file yet."""
    trainer.strategy.connect(module)
    module.trainer = data.trainer = trainer
    data.selector = Uniform()
    data.setup("fit")
    if not data.measured("val"):
        raise UserError("The config holds no prompts out. Set data.val_size, or name a set in data.val.")
    moments: dict[str, Any] | None = None
    if checkpoint is not None:
        if checkpoint.is_dir():
            raise UserError(f"--ckpt_path {checkpoint} is sharded. Give the checkpoint of a run in one process.")
        moments = checkpoint_files.read(checkpoint)["optimizer_states"][0]
    try:
        load_policy(module, checkpoint)
        walker = Walker(module, trainer, data, moments)
        for number, cell in enumerate(todo, 1):
            rate, uses, seed = cell
            print(f"{number} of {len(todo)}: learning rate {rate:g}, uses {uses}, seed {seed}", flush=True)
            write_whole(_file(out, cell), json.dumps(measure(walker, plan, rate, uses, seed), allow_nan=False) + "\n")
    finally:
        module.teardown("worth")


def _file(out: Path, cell: tuple[float, int, int]) -> Path:
    rate, uses, seed = cell
    return out / "cells" / f"rate_{rate:g}_uses_{uses}_seed_{seed}.json"


def _settings(built: BuiltRun, plan: Plan, checkpoint: Path | None) -> dict[str, Any]:
    """Return the settings that the measurements depend on, as plain values."""
    config = built.parser.dump(built.config, skip_none=False)
    found = dataclasses.asdict(plan) | {"config": hashlib.sha256(config.encode()).hexdigest()[:16], "checkpoint": None}
    if checkpoint is not None:
        with checkpoint.open("rb") as file:
            found["checkpoint"] = hashlib.file_digest(file, "blake2b").hexdigest()[:32]
    # A cell depends on its own rate and seed alone: a study may be given more of them later.
    return {name: value for name, value in found.items() if name not in ("seeds", "learning_rates")}


class BuiltRun(DotsCLI):
    """The module, the data and the trainer of configs, none of which runs."""

    def __init__(self, configs: list[str]) -> None:
        options = [word for config in configs for word in ("--config", config)]
        super().__init__(["fit", *options, "--trainer.logger=false"])

    def _run_subcommand(self, subcommand: str) -> None:
        """Do nothing."""


def worth_parser() -> DotsArgumentParser:
    """Return the parser of `dots worth`."""
    parser = command_parser("worth", _DESCRIPTION)
    add = parser.add_argument
    add("--config", action="config", help="YAML file of these options")
    add("--base", type=str, nargs="+", required=True, help="configs of the run, in order")
    add("--ckpt_path", type=str | None, default=None, help="checkpoint or run folder; null for the initial policy")
    add("--out", type=str, required=True, help="folder of worth.json, worth.csv, worth.png and what was measured")
    add("--ages", type=int, nargs="+", default=[1, 2, 4, 8], help="steps between the birth of a group and its replay")
    add("--uses", type=int, nargs="+", default=[0, 1, 2], help=_USES)
    add("--learning_rates", type=float, nargs="+", default=[3e-4, 1e-4, 3e-5], help="constant, one walk for each")
    add("--seeds", type=int, nargs="+", default=[0, 1, 2], help="walks with each rate; all figures are paired by seed")
    add("--groups", type=int, default=8, help="informative fresh groups of the step that groups are added to")
    add("--draws", type=int, default=4, help="draws of these groups for every walk")
    add("--prompts", type=int, default=64, help="prompts rolled out at the end of a walk, for the fresh groups")
    add("--held_out", type=int, default=120, help="held-out prompts whose success is measured")
    add("--sampled", type=bool, default=False, help="also measure the first draw's steps by new completions")
    add("--seconds_per_token", type=float, default=0.0, help="seconds that generating a token costs more elsewhere")
    return parser


def read_plan(options: Namespace) -> Plan:
    """Return the plan. Raises UserError for options that cannot be used."""
    limits = {"ages": 1, "uses": 0, "seeds": 0, "groups": 1, "draws": 1, "prompts": 2, "held_out": 1}
    for name, least in (limits | {"learning_rates": 0.0, "seconds_per_token": 0.0}).items():
        given = options[name]
        numbers = given if isinstance(given, list) else [given]
        if not numbers or not all(least <= one < float("inf") for one in numbers):
            shown = " ".join(map(str, numbers)) or "empty"
            raise UserError(f"--{name} is {shown}, expected {least} or more. Change it.")
        if len(set(numbers)) < len(numbers):
            raise UserError(f"--{name} is {' '.join(map(str, numbers))}, with a number twice. Give each once.")
    if min(options.learning_rates) == 0:
        raise UserError("--learning_rates has a 0, with which nothing moves. Give rates above 0.")
    if max(options.uses) > max(options.ages):
        raise UserError(
            f"--uses has {max(options.uses)}, but a group of age {max(options.ages)} (--ages) has been in at most as "
            "many updates as its age. Raise --ages or lower --uses."
        )
    return Plan(
        tuple(sorted(options.ages)), tuple(sorted(options.uses)), tuple(options.learning_rates), tuple(options.seeds),
        options.groups, options.draws, options.prompts, options.held_out, options.sampled,
    )  # fmt: skip
