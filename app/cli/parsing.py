"""The command's parser: whatever is wrong with the input is said in one line on stderr, with exit code 2."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

import torch.distributed as dist
from lightning.pytorch.cli import LightningArgumentParser
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from app.cli.diagnosis import explain
from datamodules.errors import UserError

DEBUG_FLAG = "--debug"
DEBUG_VARIABLE = "DOTS_DEBUG"
_NOT_OURS = frozenset({errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.ENOTDIR})
"""Errors of the disk, not of the program."""

# Lightning calls names that jsonargparse has deprecated; nothing the user could change.
os.environ.setdefault("JSONARGPARSE_DEPRECATION_WARNINGS", "off")


class DotsArgumentParser(LightningArgumentParser):
    """LightningArgumentParser whose errors are one line.

    jsonargparse prints the whole usage and nested reports, and names a wrong key without the section it stands in.
    `--debug` anywhere on the command line, or DOTS_DEBUG=1, gives the traceback instead.

    Args:
        args: as for LightningArgumentParser.
        kwargs: as for LightningArgumentParser. Abbreviated options are off unless asked for: a misspelt option should
            be reported, not completed.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        kwargs.setdefault("allow_abbrev", False)
        super().__init__(*args, **kwargs)
        self._given: list[str] = []

    def parse_args(self, args: Any = None, *rest: Any, **kwargs: Any) -> Any:
        given = list(sys.argv[1:] if args is None else args)
        if DEBUG_FLAG in given:
            os.environ[DEBUG_VARIABLE] = "1"
            given = [token for token in given if token != DEBUG_FLAG]
        self._given = given
        try:
            return super().parse_args(given, *rest, **kwargs)
        except UnicodeDecodeError as error:  # jsonargparse reads config files as UTF-8, whatever they are
            self.error(f"Problems parsing config: {error}", error)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        # Parsers of nested classes are told not to exit: their message belongs to the error of the outermost one.
        if debugging() or not self.exit_on_error:
            super().error(message, ex)
        inner = find_user_error(ex)
        print_and_exit(str(inner) if inner else explain(message, self._given, self._option_names()))

    def _option_names(self) -> set[str]:
        """Dotted names of every option, those of the subcommands included."""
        names: set[str] = set()
        for action in self._actions:
            names.update(option[2:] for option in action.option_strings if option.startswith("--"))
            choices = getattr(action, "_name_parser_map", None)
            for parser in choices.values() if choices else ():
                names.update(parser._option_names() if isinstance(parser, DotsArgumentParser) else ())
        return names


def debugging() -> bool:
    """Whether errors of the user's input should show where they arose."""
    return os.environ.get(DEBUG_VARIABLE, "0") not in ("", "0")


def run_or_exit(run: Callable[[], Any]) -> None:
    """Calls `run`; a UserError, also one that a parser or trainer wrapped, becomes one line and exit code 2."""
    try:
        run()
    except Exception as error:
        inner = find_user_error(error) or _misconfigured(error)
        if inner is None or debugging():
            if dist.is_available() and dist.is_initialized():
                error.add_note(f"on rank {dist.get_rank()} of {dist.get_world_size()}")
            raise
        print_and_exit(str(inner))


def _misconfigured(error: BaseException) -> UserError | None:
    """What Lightning says of options that it cannot run with, and the system of files that cannot be used."""
    for each in _chain(error):
        said = " ".join(str(each).split())
        if isinstance(each, MisconfigurationException):
            return UserError(f"{said} (expected other trainer options: change them in the config or as --trainer....)")
        if isinstance(each, OSError) and each.errno in _NOT_OURS and each.filename is not None:
            return UserError(
                f"{each.filename}: {each.strerror}; expected a place that can be used: free it or name another"
            )
    return None


def print_and_exit(message: str) -> NoReturn:
    """Prints `dots: error: message` in one line on stderr, with the rank where there are several; exits with code 2."""
    rank = f"rank {dist.get_rank()}:" if dist.is_available() and dist.is_initialized() else ""
    print(*filter(None, ["dots: error:", rank, " ".join(message.split())]), file=sys.stderr, flush=True)
    raise SystemExit(2)


def find_user_error(error: BaseException | None) -> UserError | None:
    """The first UserError among an exception, its causes and the exceptions it arose from."""
    return next((each for each in _chain(error) if isinstance(each, UserError)), None)


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    pending, seen = [error], set()
    while pending:
        current = pending.pop()
        if current is None or id(current) in seen:
            continue
        seen.add(id(current))
        yield current
        pending += [current.__context__, current.__cause__]
