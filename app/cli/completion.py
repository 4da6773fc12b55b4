"""`dots completion bash|zsh`: a script that completes subcommands and options, written by shtab."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from typing import Any, NoReturn

import shtab

from app.cli.commands import COMMANDS, LIGHTNING_COMMANDS, command_parser
from app.cli.dots import DotsCLI
from app.cli.parsing import DotsArgumentParser

_DESCRIPTION = (
    "Print a script that completes subcommands and options. For bash: dots completion bash > "
    "~/.local/share/bash-completion/completions/dots. For zsh: dots completion zsh > FOLDER/_dots, with a FOLDER of "
    "$fpath."
)
_FILES = ("path", "config", "ckpt_path", "resume", "out", "data", "base", "traces", "outcomes", "dirpath", "report")
_ALSO_OF_FIT = ("dry_run", "resume")


def main(args: list[str]) -> None:
    """Run `dots completion` with the arguments that follow it."""
    parser = command_parser("completion", _DESCRIPTION)
    parser.add_argument("shell", choices=["bash", "zsh"], help="the shell that reads the script")
    print(shtab.complete(_tree(), parser.parse_args(args).shell))


def _tree() -> argparse.ArgumentParser:
    """Return a parser of all subcommands with the names of their options, those of the default classes included."""
    root = argparse.ArgumentParser("dots")
    root.add_argument("--version", action="store_true", help="print the version")
    commands = root.add_subparsers()
    built = _parser_built_by(lambda: DotsCLI(["--help"]))
    of_lightning = next(action.choices for action in built._actions if isinstance(action, argparse._SubParsersAction))
    for name, summary in LIGHTNING_COMMANDS.items():
        also = _ALSO_OF_FIT if name == "fit" else ()
        _add(commands, name, summary, of_lightning["show_data" if name == "data" else name], also)
    for name, command in COMMANDS.items():
        if name == "difficulty":
            actions = commands.add_parser(name, help=command.summary).add_subparsers()
            for one in ("fit", "evaluate", "import"):
                _add(actions, one, one, _parser_built_by(partial(COMMANDS["difficulty"].run, [one])))
        elif name == "completion":
            commands.add_parser(name, help=command.summary).add_argument("shell", choices=["bash", "zsh"])
        else:
            _add(commands, name, command.summary, _parser_built_by(partial(command.run, [])))
    return root


def _add(commands: Any, name: str, summary: str, parser: DotsArgumentParser, also: tuple[str, ...] = ()) -> None:
    shown = commands.add_parser(name, help=summary)
    for option in sorted(parser.option_names() - {"help"} | set(also)):
        if not option.endswith(("+", ".help")):
            added = shown.add_argument(f"--{option}", help=option)
            if option.rpartition(".")[2] in _FILES:
                added.complete = shtab.FILE


class _BuiltError(BaseException):
    def __init__(self, parser: DotsArgumentParser) -> None:
        super().__init__()
        self.parser = parser


def _parser_built_by(run: Callable[[], object]) -> DotsArgumentParser:
    """Return the parser that a command would parse its arguments with."""

    def stop(self: DotsArgumentParser, *args: object, **kwargs: object) -> NoReturn:
        raise _BuiltError(self)

    parse, DotsArgumentParser.parse_args = DotsArgumentParser.parse_args, stop  # type: ignore[method-assign]
    try:
        run()
    except _BuiltError as built:
        return built.parser
    finally:
        DotsArgumentParser.parse_args = parse  # type: ignore[method-assign]
    raise AssertionError("a command parses its arguments")
