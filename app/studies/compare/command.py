"""`dots compare`: runs of several methods on one machine, and what each needs to match the baseline."""

from __future__ import annotations

import sys
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from app.studies.compare.markdown import markdown
from app.studies.compare.options import compare_parser, read_request
from app.studies.compare.page import page
from app.studies.compare.records import read_comparison
from app.studies.compare.request import Request
from app.studies.compare.runner import run_all
from app.studies.compare.settings import Settings, resolve
from app.studies.compare.summary import Figures, summarise, write_json
from app.studies.compare.wording import Row, short_table
from datamodules.errors import UserError

_WIDTH = 148
_STOPPED = 130


def main(args: list[str]) -> None:
    """Runs `dots compare` with the arguments that follow it."""
    options = compare_parser().parse_args(args)
    if options.report is not None:
        out = Path(options.report).expanduser()
        report(Request.load(out), out)
        return
    request = read_request(options)
    out = Path(options.out).expanduser()
    settings = _resolved(request)
    try:
        out.mkdir(parents=True, exist_ok=True)
        run_all(request, out, settings)
    except KeyboardInterrupt:
        print("dots: the comparison is stopped; the same command goes on", file=sys.stderr, flush=True)
        raise SystemExit(_STOPPED) from None
    except FileExistsError as error:
        raise UserError(f"--out {out}: expected a folder, or nothing yet; give another name") from error
    report(request, out)


def report(request: Request, out: Path) -> None:
    """Writes `compare.json`, `compare.md` and `compare.html` from the finished runs, and prints their tables."""
    comparison = read_comparison(request, out)
    figures = summarise(comparison)
    write_json(out / "compare.json", figures)
    (out / "compare.md").write_text(markdown(figures), encoding="utf-8")
    (out / "compare.html").write_text(page(comparison, figures), encoding="utf-8")
    _print(figures, out)


def _resolved(request: Request) -> dict[tuple[str, int], Settings]:
    """The settings of every run: all of them are checked before the first begins."""
    found: dict[tuple[str, int], Settings] = {}
    for arm in request.arms:
        known: dict[tuple[str, ...], Settings] = {}
        for seed in request.seeds:
            files = tuple(arm.files(seed))
            if files not in known:
                known[files] = resolve(request, arm, seed)
            found[arm.name, seed] = known[files] | {"seed_everything": seed}
    return found


def _print(figures: Figures, out: Path) -> None:
    console = Console(width=max(_WIDTH, Console().width))
    arms, baseline = figures["arms"], figures["setting"]["baseline"]
    console.print(_table(f"cost of the final accuracy of {baseline}, over its own", *short_table(arms)))
    for missing in figures["setting"]["missing"]:
        console.print(f"not finished: {missing}", highlight=False)
    console.print(f"report: {out / 'compare.html'}", highlight=False, soft_wrap=True)


def _table(title: str, head: Row, rows: list[Row]) -> Table:
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1))
    for place, name in enumerate(head):
        table.add_column(name, justify="right" if place else "left")
    for row in rows:
        table.add_row(*row)
    return table
