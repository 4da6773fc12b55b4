"""The subcommands of `dots` that train nothing by Lightning: studies and tools with options of their own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module

from app.cli.parsing import DotsArgumentParser


@dataclass(frozen=True, slots=True)
class Command:
    """A subcommand that is imported only when it is asked for.

    Attributes:
        summary: one line for `dots --help`.
        target: `module:function`; the function takes the arguments that follow the subcommand.
    """

    summary: str
    target: str

    def run(self, args: list[str]) -> None:
        module, function = self.target.split(":")
        entry: Callable[[list[str]], None] = getattr(import_module(module), function)
        entry(args)


COMMANDS = {
    "difficulty": Command("train or evaluate a difficulty predictor", "app.studies.difficulty.command:main"),
    "compare": Command("measure what methods need to match plain GRPO", "app.studies.compare.command:main"),
    "forecast": Command("compare selectors on a recorded run", "app.studies.forecast.command:main"),
}


def command_parser(name: str, description: str) -> DotsArgumentParser:
    """A parser for `dots NAME`, with one-line errors."""
    return DotsArgumentParser(prog=f"dots {name}", description=description)


def epilog() -> str:
    """What `dots --help` says of these subcommands."""
    return "Also: " + "; ".join(f"dots {name} - {command.summary}" for name, command in COMMANDS.items()) + "."
