"""`dots report`: the page of a run that has ended."""

from __future__ import annotations

from pathlib import Path

from app.cli.commands import command_parser
from app.reporting.run_page import write_report

_DESCRIPTION = (
    "Write report.html in the folder of a run: curves, what teaches, hardest and easiest prompts, seconds by phase. A "
    "run that ends in order writes it itself."
)


def main(args: list[str]) -> None:
    """Run `dots report` with the arguments that follow it."""
    parser = command_parser("report", _DESCRIPTION)
    parser.add_argument("run", type=str, help="folder of a training run, such as runs/NAME/version_0")
    print(f"report: {write_report(Path(parser.parse_args(args).run).expanduser())}")
