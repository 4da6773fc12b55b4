"""The subcommands of `dots`: one list of all, and those that do not go through LightningCLI."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pkgutil import resolve_name
from typing import TYPE_CHECKING

from app.cli.failures import stage

if TYPE_CHECKING:
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


COMMANDS: dict[str, Command] = {
    "init": Command("write a config for your own data, model and reward", "app.cli.init:main"),
    "difficulty": Command("train, evaluate or import a difficulty predictor", "app.studies.difficulty.command:main"),
    "compare": Command("measure what methods need to match plain GRPO", "app.studies.compare.command:main"),
    "report": Command("write the page of a run that has ended", "app.cli.report:main"),
    "forecast": Command("compare selectors on a recorded run", "app.studies.forecast.command:main"),
    "worth": Command("measure what replayed groups are worth", "app.studies.worth.command:main"),
    "completion": Command("print a script that completes this command in bash or zsh", "app.cli.completion:main"),
}
LIGHTNING_COMMANDS: dict[str, str] = {
    "fit": "train a policy (also: dots train)",
    "validate": "measure a policy on the validation prompts",
    "test": "measure a policy on the test prompts (also: dots evaluate, dots eval)",
    "predict": "write completions of the test prompts",
    "data": "show what a config reads: rows, lengths, three prompts with their answers",
    "describe": "show what a run will do, and its memory, without loading weights",
    "doctor": "check what a run would meet on this machine",
    "export": "write a checkpoint's policy as a Hugging Face folder",
    "select": "choose a subset of the prompts before training",
    "serve": "run a vLLM server of the policy",
}
ALIASES: dict[str, str] = {"train": "fit", "eval": "test", "evaluate": "test", "data": "show_data"}
"""Other names of subcommands. Options of the data are called `data`, so that no subcommand can be."""
_ORDER = (
    ("Start", ("init", "data", "describe", "doctor")),
    ("Train", ("fit", "select", "serve")),
    ("Use", ("validate", "test", "predict", "export", "report", "completion")),
    ("Study", ("compare", "forecast", "worth", "difficulty")),
)


def overview() -> str:
    """Return the text of `dots --help`."""
    lines = ["usage: dots COMMAND [options]", "", "Data-efficient reinforcement fine-tuning of language models."]
    for title, names in _ORDER:
        lines += ["", title]
        lines += [f"  {name:<11} {LIGHTNING_COMMANDS.get(name) or COMMANDS[name].summary}" for name in names]
    return "\n".join([
        *lines, "",
        "A first run:  dots init --data my.jsonl --model MODEL --reward math",
        "Options:      dots COMMAND --help; dots --version; --debug shows the traceback of an error",
    ])  # fmt: skip


def command_parser(name: str, description: str) -> DotsArgumentParser:
    """Return a parser for `dots NAME`, with one-line errors."""
    from app.cli.parsing import DotsArgumentParser

    return DotsArgumentParser(prog=f"dots {name}", description=description)
