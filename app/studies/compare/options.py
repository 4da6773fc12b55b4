"""The options of `dots compare`."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

from jsonargparse import Namespace

from app.cli.commands import command_parser
from app.cli.parsing import DotsArgumentParser
from app.studies.compare.request import SEED, Arm, Budget, Request
from datamodules.errors import UserError

DESCRIPTION = (
    "Trains every arm with every seed on this machine, in turn, and reports what each needs to reach the accuracy of "
    "the baseline. The same command goes on where it was stopped. For example: dots compare --base "
    "configs/quickstart.yaml --arms grpo=configs/arms/grpo.yaml dots_rr=configs/arms/dots_rr.yaml --seeds 0 1 2 "
    "--evaluate_every 2 --out DIR"
)
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")


def compare_parser() -> DotsArgumentParser:
    """The parser of `dots compare`."""
    parser = command_parser("compare", DESCRIPTION)
    add = parser.add_argument
    add("--base", type=str, nargs="+", default=[], help="configs that all arms share, in order")
    add(
        "--arms",
        type=str,
        nargs="+",
        default=[],
        help="NAME=CONFIG of each, or NAME=CONFIG,CONFIG,...: overlays over the base; {seed} in a file's name is "
        "the seed of the run",
    )
    add("--seeds", type=int, nargs="+", default=[0, 1, 2], help="seeds with which every arm runs")
    add("--out", type=str, default=None, help="folder of the runs and of compare.json, compare.md and compare.html")
    add("--baseline", type=str, default=None, help="arm to be matched; by default the one named grpo, else the first")
    add(
        "--budget",
        type=str,
        default="baseline",
        help="when a run ends. baseline: the baseline runs its trainer.max_steps, every other arm until its training "
        "clock passes that of the baseline with the same seed, so that one which never gets there had the same time; "
        "steps: all run their trainer.max_steps; a number: all run so many seconds of the training clock",
    )
    add("--step_limit", type=float, default=4.0, help="under a clock, at most so many times trainer.max_steps")
    add("--evaluate_every", type=int | None, default=None, help="steps between evaluations; null: as in the base")
    add("--smooth", type=int, default=3, help="evaluations in the trailing mean that has to reach the accuracy")
    add("--report", type=str, default=None, help="only rebuild the report of this folder from its finished runs")
    return parser


def read_request(options: Namespace) -> Request:
    """Checks the options. Raises UserError for those that cannot be used."""
    if not options.base:
        raise UserError("--base is missing: expected the configs that all arms share, e.g. configs/quickstart.yaml")
    if options.out is None:
        raise UserError("--out is missing: expected the folder for runs and report")
    arms = tuple(_arm(text) for text in options.arms)
    _check_unique([arm.name for arm in arms], "--arms")
    if len(arms) < 2:
        raise UserError(f"--arms names {len(arms)} arm(s), expected at least 2: NAME=CONFIG of a baseline and another")
    seeds = tuple(options.seeds)
    _check_unique(map(str, seeds), "--seeds")
    for name, value in (("smooth", options.smooth), ("evaluate_every", options.evaluate_every)):
        if value is not None and value < 1:
            raise UserError(f"--{name} is {value}, expected at least 1")
    if options.step_limit < 1:
        raise UserError(f"--step_limit is {options.step_limit}, expected at least 1")
    if not seeds or min(seeds) < 0:
        raise UserError(f"--seeds {' '.join(map(str, seeds))}: expected at least one, each 0 or more")
    names = [arm.name for arm in arms]
    baseline = options.baseline or ("grpo" if "grpo" in names else names[0])
    if baseline not in names:
        raise UserError(f"--baseline {baseline}: no arm of this name, expected one of {', '.join(names)}")
    _check_files(options.base, arms, seeds)
    budget = Budget.parse(options.budget, options.step_limit)
    return Request(tuple(options.base), arms, seeds, baseline, budget, options.evaluate_every, options.smooth)


def _arm(text: str) -> Arm:
    name, equals, files = text.partition("=")
    if not equals or not files or not _NAME.fullmatch(name):
        raise UserError(
            f"--arms {text}: expected NAME=CONFIG, the name of letters, digits, _ . and -, e.g. "
            "grpo=configs/arms/grpo.yaml"
        )
    return Arm(name, tuple(files.split(",")))


def _check_unique(names: Iterable[str], option: str) -> None:
    twice = [name for name, times in Counter(names).items() if times > 1]
    if twice:
        raise UserError(f"{option} names {twice[0]} more than once: give every one its own name")


def _check_files(base: Sequence[str], arms: Sequence[Arm], seeds: Sequence[int]) -> None:
    wanted = [("--base", name) for name in base]
    wanted += [(f"--arms {arm.name}", file) for arm in arms for seed in seeds for file in arm.files(seed)]
    for option, name in wanted:
        if not Path(name).is_file():
            hint = f"; {SEED} stands for a seed" if SEED in name else ""
            raise UserError(f"{option}: no such file {name}; expected a YAML config{hint}")
