"""`dots completion SHELL`: the completion script of a shell, by shtab."""

from __future__ import annotations

import argparse

import shtab

from app.cli.commands import ALIASES, COMMANDS, command_parser


def main(args: list[str]) -> None:
    """Print the script."""
    from app.cli.dots import DotsCLI

    parser = command_parser("completion", "Print the completion script of a shell: eval \"$(dots completion bash)\".")
    parser.add_argument("shell", choices=["bash", "zsh", "tcsh"], help="the shell")
    shell = parser.parse_args(args).shell
    print(shtab.complete(_whole(DotsCLI.parser_of_all()), shell=shell))


def _whole(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add the subcommands that do not go through LightningCLI, by their names."""
    return parser
