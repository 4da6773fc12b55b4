"""The subcommands of `dots` that do not go through LightningCLI: studies and tools with options of their own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pkgutil import resolve_name

from app.cli.failures import stage
from app.cli.parsing import DotsArgumentParser


@dataclass(frozen=True, slots=True)
class Command:
    """A subcommand, imported only when it is used.

    Attributes:
        summary: one line for `dots --help`.
        target: `module:function`; the function is passed the arguments after the subcommand.
    """

    summary: str
    target: str

    def run(self, args: list[str]) -> None:
        """Import the subcommand and call it with the arguments after its name."""
        entry: Callable[[list[str]], None] = resolve_name(self.target)
        with stage(f"running the command to {self.summary}"):
            entry(args)


COMMANDS = {
    "difficulty": Command("train or evaluate a difficulty predictor", "app.studies.difficulty.command:main"),
    "compare": Command("measure what methods need to match plain GRPO", "app.studies.compare.command:main"),
    "report": Command("write the page of a run that has ended", "app.cli.report:main"),
    "forecast": Command("compare selectors on a recorded run", "app.studies.forecast.command:main"),
}


def command_parser(name: str, description: str) -> DotsArgumentParser:
    """Return a parser for `dots NAME`, with one-line errors."""
    return DotsArgumentParser(prog=f"dots {name}", description=description)


def epilog() -> str:
    """Return the part of `dots --help` that lists these subcommands."""
    return "Also: " + "; ".join(f"dots {name} - {command.summary}" for name, command in COMMANDS.items()) + "."
