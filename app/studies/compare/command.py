"""The command `dots compare`: options, runs, report."""

from __future__ import annotations

import json
import re
import signal
import sys
from collections import Counter
from pathlib import Path

from jsonargparse import Namespace

from app.cli.commands import command_parser
from app.cli.parsing import DotsArgumentParser
from app.studies.compare.accuracy import save_picture
from app.studies.compare.figures import summarise
from app.studies.compare.page import page
from app.studies.compare.records import read_comparison
from app.studies.compare.request import SEED, Arm, Budget, Request
from app.studies.compare.runner import run_all
from app.studies.compare.settings import Settings, resolve
from app.studies.compare.tables import markdown, short_table
from datamodules.errors import UserError

_DESCRIPTION = (
    "Train every arm with every seed on this machine, in turn, and report what each needs to reach the accuracy of the "
    "baseline. Repeat the same command to continue a comparison that was stopped. For example: dots compare --base "
    "configs/quickstart.yaml --arms grpo=configs/arms/grpo.yaml dots_rr=configs/arms/dots_rr.yaml --seeds 0 1 2 "
    "--evaluate_every 2 --out DIR"
)
_ARMS = (
    "arms as NAME=CONFIG or NAME=CONFIG,CONFIG,...: overlays over the base; {seed} in a file name is replaced by the "
    "seed of the run. Without arms the base itself is run with every seed"
)
_BUDGET = (
    "when a run ends. baseline: the baseline runs its trainer.max_steps, every other arm until its training clock "
    "passes that of the baseline with the same seed; steps: every arm runs its trainer.max_steps; a number: every arm "
    "runs this many seconds of the training clock"
)
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")
_STOPPED = 130


def main(args: list[str]) -> None:
    """Run `dots compare` with the arguments that follow it."""
    options = _parser().parse_args(args)
    if options.report is not None:
        out = Path(options.report).expanduser()
        report(Request.load(out), out)
        return
    request, out = read_request(options), Path(options.out).expanduser()
    # All settings are checked before the first run begins. Seeds that share their configs differ in the seed alone.
    resolved: dict[tuple[str, ...], Settings] = {}
    settings: dict[tuple[str, int], Settings] = {}
    for arm, seed in request.runs():
        files = arm.files(seed)
        if (arm.name, *files) not in resolved:
            resolved[arm.name, *files] = resolve(request, arm, seed)
        settings[arm.name, seed] = resolved[arm.name, *files] | {"seed_everything": seed}
    # SIGTERM stops the comparison as Ctrl-C does, so that the current run saves a checkpoint.
    handler = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        out.mkdir(parents=True, exist_ok=True)
        run_all(request, out, settings)
    except KeyboardInterrupt:
        print("dots: comparison stopped; repeat the same command to continue", file=sys.stderr, flush=True)
        raise SystemExit(_STOPPED) from None
    except FileExistsError as error:
        raise UserError(f"--out {out} is a file. Give a folder, which is created if needed.") from error
    finally:
        signal.signal(signal.SIGTERM, handler)
    report(request, out)


def report(request: Request, out: Path) -> None:
    """Write the report of the finished runs (`compare.json`, `.md`, `.html`, `.png`), and print the cost table."""
    comparison = read_comparison(request, out)
    figures = summarise(comparison)
    (out / "compare.json").write_text(json.dumps(figures, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    (out / "compare.md").write_text(markdown(figures), encoding="utf-8")
    (out / "compare.html").write_text(page(comparison, figures), encoding="utf-8")
    save_picture(comparison, figures, out / "compare.png")
    if len(request.arms) > 1:
        print(f"Cost to the final accuracy of {request.baseline}, relative to its own:")
    print(short_table(figures).to_string())
    for missing in comparison.missing:
        print(f"not finished: {missing}")
    print(f"curves: {out / 'compare.png'}")
    print(f"report: {out / 'compare.html'} (tables alone: {out / 'compare.md'})")


def read_request(options: Namespace) -> Request:
    """Turn the options into a request. Raises UserError for values that cannot be used."""
    if not options.base:
        raise UserError("--base is missing. Give the configs that all arms share, e.g. configs/quickstart.yaml.")
    if options.out is None:
        raise UserError("--out is missing. Give a folder for the runs and the report.")
    arms = []
    for text in options.arms:
        name, _, files = text.partition("=")
        if not files or not _NAME.fullmatch(name):
            raise UserError(
                f"--arms {text}: expected NAME=CONFIG with a name of letters, digits, _ . and -. Give e.g. "
                "grpo=configs/arms/grpo.yaml."
            )
        arms.append(Arm(name, tuple(files.split(","))))
    names, seeds = [arm.name for arm in arms], tuple(options.seeds)
    for option, given in (("--arms", names), ("--seeds", options.seeds)):
        if twice := [one for one, times in Counter(given).items() if times > 1]:
            raise UserError(f"{option} names {twice[0]} more than once. Give each of them once.")
    if not arms:
        arms = [Arm(Path(options.base[-1]).stem, ())]
        names = [arms[0].name]
    if not seeds or min(seeds) < 0:
        raise UserError(f"--seeds is {' '.join(map(str, seeds))}. Give at least one seed, each 0 or more.")
    for option in ("smooth", "evaluate_every", "step_limit"):
        value = options[option]
        if value is not None and value < 1:
            raise UserError(f"--{option} is {value}, expected at least 1. Give a larger number.")
    baseline = options.baseline or ("grpo" if "grpo" in names else names[0])
    if baseline not in names:
        raise UserError(f"--baseline {baseline} names no arm, expected one of {', '.join(names)}. Give one of those.")
    wanted = [("--base", file) for file in options.base]
    wanted += [(f"--arms {arm.name}", file) for arm in arms for seed in seeds for file in arm.files(seed)]
    for option, file in wanted:
        if not Path(file).is_file():
            raise UserError(f"{option}: no such file {file}. Give a YAML config; {SEED} stands for the seed of a run.")
    alone = len(arms) == 1 and options.budget == "baseline"  # the baseline's own budget is its steps
    budget = Budget.parse("steps" if alone else options.budget, options.step_limit)
    return Request(tuple(options.base), tuple(arms), seeds, baseline, budget, options.evaluate_every, options.smooth)


def _parser() -> DotsArgumentParser:
    parser = command_parser("compare", _DESCRIPTION)
    add = parser.add_argument
    add("--base", type=str, nargs="+", default=[], help="configs that all arms share, in order")
    add("--arms", type=str, nargs="+", default=[], help=_ARMS)
    add("--seeds", type=int, nargs="+", default=[0, 1, 2], help="seeds; every arm runs once with each")
    add("--out", type=str, default=None, help="folder for the runs and the report: compare.html, .md, .json and .png")
    add("--baseline", type=str, default=None, help="arm to match; null: the one named grpo, else the first")
    add("--budget", type=str, default="baseline", help=_BUDGET)
    add("--step_limit", type=float, default=4.0, help="limit of steps under a clock, in multiples of trainer.max_steps")
    add("--evaluate_every", type=int | None, default=None, help="steps between evaluations; null: as in the base")
    add("--smooth", type=int, default=3, help="evaluations in the trailing mean that has to reach the accuracy")
    add("--report", type=str, default=None, help="folder of a comparison: only rebuild its report from finished runs")
    return parser
