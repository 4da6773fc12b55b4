"""Compare selectors on a recorded run (`dots forecast`).

A file of pass rates by visit, or the validations of a run, stands in for the policy, so that selection methods are
compared in seconds. The study knows every prompt's outcome at every visit; a selector learns only those of the prompts
that it chose.
"""

from __future__ import annotations

import inspect
import json
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from pkgutil import resolve_name

from jsonargparse import Namespace
from rich.console import Console
from rich.progress import track

from app.cli.commands import command_parser
from app.cli.parsing import DotsArgumentParser, short_names
from app.studies.forecast.oracle import Oracle
from app.studies.forecast.recorded_run import Budget, Replay, Traces, read_traces, replay, revealed
from app.studies.forecast.report import draw_study, print_table, summarise, visits_table, write_json
from app.studies.forecast.validations import read_validations
from datamodules.errors import UserError, nearest
from datamodules.selectors import SelectionContext, Selector

_DESCRIPTION = (
    "Compares selectors on a recorded run: each chooses prompts visit by visit, sees only what it chose, and is scored "
    "on all. For example: dots forecast --traces rates.jsonl --selector Uniform --selector Mopps --selector Dots "
    "--selector.alpha 0.4 --encoder FOLDER --out study"
)
_TRACES = (
    'JSONL of {"question", "pass_rate_by_epoch": [rate, ...]}, or the folder of a run whose validations are the visits'
)
_SELECTOR = (
    "class name or dotted path; may be repeated, and --selector.OPTION VALUE is an option of the latest. The row is "
    "labelled by the class's name, followed by its options where two are of one class"
)
_SELECTORS = "mapping of row labels to {class_path, init_args}, mostly for --config; --selectors.LABEL NAME adds one"
_ORACLE = "oracle"


@dataclass(frozen=True, slots=True)
class Contender:
    """One row of the study; `make` returns a new selector, which `reveal_all` shows every prompt's outcome."""

    label: str
    make: Callable[[], Selector]
    budget: Budget
    reveal_all: bool = False


def main(args: list[str]) -> None:
    """Run `dots forecast` with the arguments that follow it."""
    parser = forecast_parser()
    options = read_options(parser, args)
    given = Path(options.traces).expanduser()
    traces = (read_validations if given.is_dir() else read_traces)(given).cut(options["from"], options.visits)
    if options.shuffle:
        traces = traces.shuffled()
    contenders = list(_contenders(parser, options))
    pool = traces.pool()
    for contender in contenders:
        # A selector that cannot start fails before the others are replayed for minutes.
        contender.make().setup(pool, _context(0, options))
    out = Path(options.out).expanduser()
    out.mkdir(parents=True, exist_ok=True)
    parser.save(options, out / "config.yaml", overwrite=True, multifile=False)
    table = visits_table(_replays(contenders, traces, options), traces.first)
    table.to_csv(out / "forecast.csv", index=False)
    figures = summarise(table)
    write_json(out / "forecast.json", *figures)
    questions, visits = traces.rates.shape
    title = (
        f"{Path(options.traces).name}: {questions} questions{', shuffled' if options.shuffle else ''}, visits "
        f"{traces.first} to {traces.first + visits - 1}, B = {options.batch}, {options.seeds} seeds, "
        f"{f'draws of {options.samples}' if options.resample else 'recorded rates'} shown"
    )
    draw_study(out / "forecast.png", title, table)
    notes = [
        "informative: share of the chosen prompts with 0 < p < 1, mean over visits, +- standard error over seeds. "
        "Pearson, Brier: the forecast before each visit's rollouts against the recorded rates of all prompts. "
        "ECE: expected calibration error, over the whole run, of the promised chance that a chosen prompt has "
        f"0 < p < 1; where a selector promises none, of 1 - f^{options.samples} - (1 - f)^{options.samples} with its "
        "forecast f. "
        "Rolled out: prompts per visit, references included.",
        f"{_ORACLE}: the ceiling, shown the outcomes of all prompts after every visit.",
    ]
    notes += [
        f"{one.label}: {one.budget.references} references every {one.budget.every} visits and {one.budget.prompts} "
        f"prompts chosen, {one.budget.rollouts_per_step:g} rolled out per visit."
        for one in contenders
        if one.budget.references
    ]
    print_table(title, notes, *figures)


def _contenders(parser: DotsArgumentParser, options: Namespace) -> Iterator[Contender]:
    """Yield the rows: each selector, again within the batch's budget where it uses references, and the ceiling."""
    for label, (group, key) in labels(options).items():
        if label == _ORACLE:
            raise UserError(f"{_ORACLE!r} is the label of the ceiling's row. Give the selector another label.")

        def make(group: str = group, key: str | int = key) -> Selector:
            return parser.instantiate_classes(options)[group][key]

        references = options.references if make().uses_references else 0
        budget = Budget(options.batch, references, options.every)
        yield Contender(label, make, budget)
        if references:
            yield Contender(f"{label}, equal budget", make, budget.within(options.batch))
    yield Contender(_ORACLE, Oracle, Budget(options.batch), reveal_all=True)


def _context(seed: int, options: Namespace) -> SelectionContext:
    return SelectionContext(seed, options.encoder, Path(options.cache_dir).expanduser())


def _replays(contenders: list[Contender], traces: Traces, options: Namespace) -> dict[str, list[Replay]]:
    """Return a replay per seed, by label."""
    seeds = range(options.seeds)
    shown = [revealed(traces, options.samples, seed if options.resample else None) for seed in seeds]
    jobs = [(contender, seed) for contender in contenders for seed in seeds]
    found: dict[str, list[Replay]] = {contender.label: [] for contender in contenders}
    console = Console(stderr=True)
    for one, seed in track(jobs, "Replaying", console=console, transient=True, disable=not console.is_terminal):
        run = replay(
            one.make(), traces, one.budget, _context(seed, options),
            shown=shown[seed], samples=options.samples, reveal_all=one.reveal_all,
        )  # fmt: skip
        found[one.label].append(run)
    return found


def forecast_parser() -> DotsArgumentParser:
    """Return the parser of `dots forecast`."""
    parser = command_parser("forecast", _DESCRIPTION)
    add = parser.add_argument
    add("--config", action="config", help="YAML file of these options; may be given several times")
    add("--traces", type=str, required=True, help=_TRACES)
    add("--selector", type=list[Selector], default=[], help=_SELECTOR)
    add("--selectors", type=dict[str, Selector], default={}, help=_SELECTORS)
    add("--batch", type=int, default=128, help="prompts chosen at every visit, B")
    add("--seeds", type=int, default=5, help="runs of every selector, with seeds 0, 1, ...")
    add("--out", type=str, required=True, help="folder of forecast.json, forecast.csv, forecast.png and config.yaml")
    add("--references", type=int, default=256, help="reference prompts of selectors that use them, K; 0 for none")
    add("--every", type=int, default=2, help="visits between two reference sets")
    add("--resample", type=bool, default=False, help="show a binomial draw of --samples instead of the recorded rate")
    add("--samples", type=int, default=8, help="completions of a group, G, from which a rate comes")
    add("--shuffle", type=bool, default=False, help="put the questions into another order")
    add("--from", type=int, default=0, help="first visit replayed, counted from 0 (22 of 44: the second half)")
    add("--visits", type=int | None, default=None, help="visits replayed; null for all that every trace has")
    add("--encoder", type=str | None, default=None, help="text encoder of selectors that embed and name none")
    add("--cache_dir", type=str, default="~/.cache/dots", help="folder of cached embeddings")
    return parser


def read_options(parser: DotsArgumentParser, args: list[str]) -> Namespace:
    """Parse the command line. Raise UserError, or exit with one line, for options that cannot be used."""
    options = parser.parse_args(list(_with_listed_selectors(args)))
    if not options.selector and not options.selectors:
        examples = " or ".join(sorted(short_names(Selector))[:3])
        raise UserError(f"No selector was given, expected at least one. Add for example --selector {examples}.")
    for name, least in (("batch", 1), ("seeds", 1), ("every", 1), ("samples", 1), ("references", 0), ("from", 0)):
        if options[name] < least:
            raise UserError(f"--{name} is {options[name]}, expected at least {least}. Give a larger number.")
    if options.references == 1:
        raise UserError("--references is 1, expected 0 (none) or at least 2. Give another number.")
    return options


def labels(options: Namespace) -> dict[str, tuple[str, str | int]]:
    """Return the place of every selector by row label: ("selectors", label) or ("selector", position)."""
    found: dict[str, tuple[str, str | int]] = {name: ("selectors", name) for name in options.selectors}
    names = [spec.class_path.rpartition(".")[2] for spec in options.selector]
    for position, (name, spec) in enumerate(zip(names, options.selector, strict=True)):
        taken = Counter(names)[name] > 1 or name in options.selectors
        label = f"{name}({_settings(spec)})" if taken and _settings(spec) else name
        if label in found:
            raise UserError(
                f"Two selectors are labelled {label!r}, expected different labels. Give them different options, or "
                "labels in --selectors."
            )
        found[label] = ("selector", position)
    return found


def _with_listed_selectors(args: list[str]) -> Iterator[str]:
    """Yield the command line with every `--selector NAME` appending to the list instead of replacing it."""
    known = short_names(Selector)
    tokens = iter(args)
    for token in tokens:
        option, equals, name = token.partition("=")
        if option.startswith("--init_args."):
            yield f"--selector.{token[2:]}"
        elif option != "--selector":
            yield token
        else:
            name = name if equals else next(tokens, "")
            if not name or name.startswith("-"):
                raise UserError(f"--selector is given without a name: {nearest(name, known)}")
            if name.isidentifier():  # dotted paths and mappings are the parser's business
                if name not in known:
                    raise UserError(f"--selector {name} is not a selector, {nearest(name, known)}")
                name = json.dumps({"class_path": f"{known[name].__module__}.{name}"})
            yield "--selector+=" + name


def _settings(spec: Namespace) -> str:
    """Return `name=value` of the options that differ from their defaults."""
    defaults = inspect.signature(resolve_name(spec.class_path)).parameters
    given = vars(spec.get("init_args") or Namespace())
    changed = {name: value for name, value in given.items() if value != defaults[name].default}
    return ", ".join(f"{name}={_shown(value)}" for name, value in changed.items())


def _shown(value: object) -> str:
    if isinstance(value, list):
        return f"[{', '.join(map(_shown, value))}]"
    if isinstance(value, Namespace) and "class_path" in value:
        settings = _settings(value)
        return value.class_path.rpartition(".")[2] + (f"({settings})" if settings else "")
    return str(value)
