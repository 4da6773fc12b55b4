"""The command's parser: anything wrong with the input becomes one line on stderr and exit code 2.

It uses private names of jsonargparse, which has no public way to list the classes that an option accepts
(`ActionTypeHint`, its `_typehint` and `get_all_subclass_paths`), and argparse's `_actions` and `_SubParsersAction`,
since a parser's options can't be listed otherwise. `jsonargparse_rules` has the rest.
"""

from __future__ import annotations

import argparse
import errno
import inspect
import os
import sys
from collections.abc import Callable, Iterator
from pkgutil import resolve_name
from types import ModuleType
from typing import Any, NoReturn

import torch.distributed as dist
from jsonargparse import Namespace
from jsonargparse._typehints import ActionTypeHint, get_all_subclass_paths
from lightning.pytorch.cli import LightningArgumentParser
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from app.cli import jsonargparse_rules
from app.cli.diagnosis import explain
from app.cli.failures import chain, describe, find_user_error, notes_of, passed_user_code, raised_by_user
from app.cli.nulls import check_nulls
from callbacks.upkeep.failed_step import NOTE
from datamodules.errors import UserError

DEBUG_FLAG = "--debug"
DEBUG_VARIABLE = "DOTS_DEBUG"
MOVED = {
    "app.sharded_strategy.ShardedStrategy": "app.runs.sharded_strategy.ShardedStrategy",
    "datamodules.supervised.Demonstrations": "datamodules.demonstrations.supervised.Demonstrations",
}
"""Class paths of earlier versions, which configs of users and the config.yaml of old runs may still name."""
_DISK_ERRORS = frozenset({errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.ENOTDIR})
_MAX_LINE = 2000

jsonargparse_rules.apply()


class DotsArgumentParser(LightningArgumentParser):
    """LightningArgumentParser whose errors are one line, and which accepts the class paths in `MOVED`.

    `--debug` anywhere on the command line, or DOTS_DEBUG=1, shows the traceback instead.

    Args:
        args: passed to LightningArgumentParser.
        kwargs: passed to LightningArgumentParser. Abbreviated options are off by default: a misspelt option should be
            reported, not completed.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        kwargs.setdefault("allow_abbrev", False)
        super().__init__(*args, **kwargs)
        self._config_file = ""
        self.read_before: tuple[str, ...] = ()
        """Options that the command takes out before it parses, for hints."""

    def parse_args(self, args: Any = None, *rest: Any, **kwargs: Any) -> Any:
        given = list(sys.argv[1:] if args is None else args)
        if DEBUG_FLAG in given:
            os.environ[DEBUG_VARIABLE] = "1"
            given = [token for token in given if token != DEBUG_FLAG]
        if set(given) & (switches := self._switches()):  # of a Boolean option, the name alone means true
            after = [*given[1:], "--"]
            given = [
                f"{token}=true" if token in switches and following.startswith("-") else token
                for token, following in zip(given, after, strict=True)
            ]
        found = super().parse_args(given, *rest, **kwargs)
        check_nulls(found.get(found.get("subcommand"), found))
        return found

    def parse_path(self, path: Any, *rest: Any, **kwargs: Any) -> Namespace:
        self._config_file = str(path)
        try:
            return super().parse_path(path, *rest, **kwargs)
        except UnicodeDecodeError as error:
            self.error(f"not a text file: {error}", error)
        except OSError as error:
            self.error(f"cannot be read ({error.strerror})", error)
        finally:
            self._config_file = ""

    def save(self, *args: Any, **kwargs: Any) -> None:
        """Write a config; it was checked when it was parsed, and a second check takes as long as the first."""
        super().save(*args, skip_validation=True, **kwargs)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        if debugging() or not self.exit_on_error:  # the outermost parser reports an error in a nested class
            super().error(message, ex)
        inner = find_user_error(ex)
        # An import of the user's module that fails is reported as if its class did not exist.
        failed = next((one for one in chain(ex) if passed_user_code(one)), None)
        line = str(inner) if inner else describe(failed) if failed else explain(message, self)
        print_and_exit(f"{self._config_file}: {line}" if self._config_file else line)

    def option_names(self) -> set[str]:
        """Return the dotted names of all options, those of the subcommands included."""
        names = {name[2:] for one in self._all_actions() for name in one.option_strings if name.startswith("--")}
        return names | {name for parser in self._parsers() for name in parser.read_before}

    def _switches(self) -> set[str]:
        kinds = [one for one in self._all_actions() if isinstance(one, ActionTypeHint) and one._typehint is bool]
        return {name for one in kinds for name in one.option_strings}

    def class_paths(self, option: str) -> list[str]:
        """Return the paths of the imported classes that a config may name for an option, the annotated class first."""
        hints = [one._typehint for one in self._all_actions() if isinstance(one, ActionTypeHint) and one.dest == option]
        return get_all_subclass_paths(hints[0], include_abstract=True, closed_types=False) if hints else []

    def of_class(self, class_path: str) -> DotsArgumentParser:
        """Return a parser of the arguments of an importable class or function."""
        parser = DotsArgumentParser(exit_on_error=False, add_help=False)
        target = resolve_name(class_path)
        add = parser.add_class_arguments if inspect.isclass(target) else parser.add_function_arguments
        add(target, fail_untyped=False)
        return parser

    def _all_actions(self) -> Iterator[argparse.Action]:
        for parser in self._parsers():
            yield from parser._actions

    def _parsers(self) -> Iterator[DotsArgumentParser]:
        yield self
        for action in self._actions:
            if isinstance(action, argparse._SubParsersAction):
                for parser in action.choices.values():
                    yield from parser._parsers()


class MovedModule(ModuleType):
    """Stands in for a module that `MOVED` names; the first use of a class prints which path to write instead."""

    def __getattr__(self, name: str) -> type:
        old = f"{self.__name__}.{name}"
        if old not in MOVED:
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        line = f"dots: warning: class_path {old} has moved and will stop working. Write {MOVED[old]} instead"
        rank_zero_only(print)(line, file=sys.stderr)
        found: type = resolve_name(MOVED[old])
        setattr(self, name, found)
        return found


for _module in {path.rpartition(".")[0] for path in MOVED}:
    sys.modules.setdefault(_module, MovedModule(_module))


def short_names(base: type) -> dict[str, type]:
    """Return `base` and its imported subclasses that are not abstract, by class name."""
    found = {} if inspect.isabstract(base) else {base.__name__: base}
    children: list[type] = base.__subclasses__()
    for child in children:
        found |= short_names(child)
    return found


def debugging() -> bool:
    """Return True if errors in the user's input should show their traceback."""
    return os.environ.get(DEBUG_VARIABLE, "0") not in ("", "0")


def run_or_exit(run: Callable[[], Any]) -> None:
    """Call `run`; turn an exception into one line and exit code 2, unless it ends a training that has begun.

    Such a training ends with the traceback, whose last line names the step, and exit code 1. Ctrl-C, `--debug` and
    exits of the command itself are left as they are.
    """
    try:
        run()
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        of_command = isinstance(error, SystemExit) and not raised_by_user(error)
        if of_command or debugging():
            _add_rank(error)
            raise
        if inner := find_user_error(error) or _configuration_or_disk_error(error):
            print_and_exit(str(inner))
        stopped = next((note for note in notes_of(error) if note.startswith(NOTE)), None)
        if stopped is None:
            print_and_exit(describe(error))
        _add_rank(error)
        if isinstance(error, SystemExit):  # of the user's code: it has no traceback and may have any code
            print_and_exit(f"{describe(error)} {stopped}", code=1)
        raise


def _add_rank(error: BaseException) -> None:
    if dist.is_available() and dist.is_initialized():
        error.add_note(f"on rank {dist.get_rank()} of {dist.get_world_size()}")


def _configuration_or_disk_error(error: BaseException) -> UserError | None:
    for each in chain(error):
        if isinstance(each, MisconfigurationException):
            return UserError(f"{each} (Lightning rejects these options: change them in the config or as --trainer....)")
        if isinstance(each, OSError) and each.errno in _DISK_ERRORS and each.filename is not None:
            return UserError(f"{each.filename}: {each.strerror}. Free the place, make it writable or name another")
    return None


def print_and_exit(message: str, code: int = 2) -> NoReturn:
    """Print `dots: error: message` as one line on stderr, with the rank if there are several, and exit.

    Characters that a terminal cannot show or would act on are escaped, and a very long line is cut.
    """
    # vLLM in this process makes a group of one.
    several = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
    rank = f"rank {dist.get_rank()}:" if several else ""
    line = " ".join(message.split())
    line = line if len(line) <= _MAX_LINE else f"{line[: _MAX_LINE // 2]} ... {line[-_MAX_LINE // 2 :]}"
    line = "".join(one if one.isprintable() else one.encode("unicode_escape").decode() for one in line)
    print(*filter(None, ["dots: error:", rank, line]), file=sys.stderr, flush=True)
    raise SystemExit(code)
