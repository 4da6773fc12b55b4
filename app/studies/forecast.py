"""`dots forecast`: selectors side by side on a recorded run.

A file of pass rates by visit stands in for the policy, so that selection methods are compared in seconds, with the
outcomes of every prompt known to the judge and only those of the chosen ones known to the selector.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from jsonargparse import Namespace
from rich.console import Console
from rich.progress import track

from app.cli.parsing import DotsArgumentParser
from app.studies.forecast_options import forecast_parser, labels, read_options
from app.studies.forecast_report import draw_study, print_table
from app.studies.forecast_summary import summarise, visits_table, write_json
from app.studies.oracle import Oracle
from app.studies.recorded_run import Budget, Replay, replay, revealed
from app.studies.traces import Traces, read_traces
from datamodules.errors import UserError
from datamodules.selectors import SelectionContext, Selector

ORACLE = "oracle"


@dataclass(frozen=True, slots=True)
class Contender:
    """One row of the study.

    Attributes:
        label: name of the row.
        make: gives a new selector, for every seed.
        budget: what it may roll out.
        reveal_all: whether it is shown every prompt's outcome.
    """

    label: str
    make: Callable[[], Selector]
    budget: Budget
    reveal_all: bool = False


def main(args: list[str]) -> None:
    """Runs `dots forecast` with the arguments that follow it."""
    parser = forecast_parser()
    options = read_options(parser, args)
    traces = read_traces(Path(options.traces).expanduser()).cut(options["from"], options.visits)
    if options.shuffle:
        traces = traces.shuffled()
    contenders = list(_contenders(parser, options))
    _try_setup(contenders, traces, options)
    out = Path(options.out).expanduser()
    out.mkdir(parents=True, exist_ok=True)
    parser.save(options, out / "config.yaml", overwrite=True, multifile=False)
    table = visits_table(_replays(contenders, traces, options), traces.first)
    table.to_csv(out / "forecast.csv", index=False)
    summaries = summarise(table)
    write_json(out / "forecast.json", summaries)
    draw_study(out / "forecast.png", _title(traces, options), table)
    print_table(_title(traces, options), list(_notes(contenders, options)), summaries)


def _contenders(parser: DotsArgumentParser, options: Namespace) -> Iterator[Contender]:
    """The rows in their order: each selector, again within the batch where it spends references, and the ceiling."""
    for label, (group, key) in labels(options).items():
        if label == ORACLE:
            raise UserError(f"{ORACLE!r} is the name of the ceiling's row: label the selector otherwise")

        def make(group: str = group, key: str | int = key) -> Selector:
            return parser.instantiate_classes(options)[group][key]

        references = options.references if make().uses_references else 0
        budget = Budget(options.batch, references, options.every)
        yield Contender(label, make, budget)
        if references:
            yield Contender(f"{label}, equal budget", make, budget.within(options.batch))
    yield Contender(ORACLE, Oracle, Budget(options.batch), reveal_all=True)


def _try_setup(contenders: list[Contender], traces: Traces, options: Namespace) -> None:
    """Raises UserError for a selector that cannot start, before the others are replayed for minutes."""
    pool = traces.pool()
    for contender in contenders:
        contender.make().setup(pool, _context(0, options))


def _context(seed: int, options: Namespace) -> SelectionContext:
    return SelectionContext(seed, options.encoder, Path(options.cache_dir).expanduser())


def _replays(contenders: list[Contender], traces: Traces, options: Namespace) -> dict[str, list[Replay]]:
    seeds = range(options.seeds)
    shown = [revealed(traces, options.samples, seed if options.resample else None) for seed in seeds]
    jobs = [(contender, seed) for contender in contenders for seed in seeds]
    found: dict[str, list[Replay]] = {contender.label: [] for contender in contenders}
    console = Console(stderr=True)
    for contender, seed in track(jobs, "Replaying", console=console, transient=True, disable=not console.is_terminal):
        found[contender.label].append(
            replay(
                contender.make(),
                traces,
                contender.budget,
                _context(seed, options),
                shown=shown[seed],
                samples=options.samples,
                reveal_all=contender.reveal_all,
            )
        )
    return found


def _title(traces: Traces, options: Namespace) -> str:
    questions, visits = traces.rates.shape
    order = ", shuffled" if options.shuffle else ""
    seen = f"draws of {options.samples}" if options.resample else "recorded rates"
    return (
        f"{Path(options.traces).name}: {questions} questions{order}, visits {traces.first} to "
        f"{traces.first + visits - 1}, B = {options.batch}, {options.seeds} seeds, {seen} shown"
    )


def _notes(contenders: list[Contender], options: Namespace) -> Iterator[str]:
    yield (
        "informative: share of the chosen prompts with 0 < p < 1, mean over visits, +- standard error over seeds. "
        "Pearson, Brier: the forecast before each visit's rollouts against the recorded rates of all prompts. "
        "Rolled out: prompts per visit, references included."
    )
    yield f"{ORACLE}: the ceiling, shown the outcomes of all prompts after every visit."
    for contender in contenders:
        budget = contender.budget
        if budget.references:
            yield (
                f"{contender.label}: {budget.references} references every {budget.every} visits and "
                f"{budget.prompts} prompts chosen, {budget.rollouts_per_step:g} rolled out per visit."
            )
