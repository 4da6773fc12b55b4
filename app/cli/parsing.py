"""The command's parser: anything wrong with the input becomes one line on stderr and exit code 2.

The only file that uses private names of jsonargparse, which has no public way to list the classes that an option
accepts (`ActionTypeHint`, its `_typehint` and `get_all_subclass_paths`), nor to call the loader that `set_loader`
replaces (`yaml_load`), nor one to choose what a change of class keeps (`discard_init_args_on_class_path_change`) or
which of several types' errors is told (`raise_union_unexpected_value`), or the class that is meant by options alone
where the annotated one is abstract (`adapt_typehints`, `NestedArg`); its `indent_text` fails for an exception
without a message. `_actions` and `_SubParsersAction` are argparse's, which can't list a parser's options otherwise.
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
import yaml
from jsonargparse import Namespace, _typehints, set_loader
from jsonargparse._loaders_dumpers import yaml_load
from jsonargparse._typehints import ActionTypeHint, NestedArg, get_all_subclass_paths
from lightning.pytorch.cli import LightningArgumentParser
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from app.cli.config_text import check_text
from app.cli.diagnosis import explain
from app.cli.failures import chain, describe, notes_of, passed_user_code, raised_by_user
from callbacks.upkeep.failed_step import NOTE
from datamodules.errors import UserError
from datamodules.prompts import PromptSource

DEBUG_FLAG = "--debug"
DEBUG_VARIABLE = "DOTS_DEBUG"
MOVED = {
    "app.sharded_strategy.ShardedStrategy": "app.runs.sharded_strategy.ShardedStrategy",
    "datamodules.supervised.Demonstrations": "datamodules.demonstrations.supervised.Demonstrations",
}
"""Class paths of earlier versions, which configs of users and the config.yaml of old runs may still name."""
_DISK_ERRORS = frozenset({errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.ENOTDIR})
_MAX_LINE = 2000


def _load(text: str) -> Any:
    check_text(text)
    return yaml_load(text)


def _indented(text: str, first_line: bool = True) -> str:
    return _indent_text(text or "-", first_line)


set_loader("yaml", _load, (yaml.YAMLError,))
_indent_text, _typehints.indent_text = _typehints.indent_text, _indented

# Lightning uses names that jsonargparse has deprecated; the user cannot change that.
os.environ.setdefault("JSONARGPARSE_DEPRECATION_WARNINGS", "off")


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
        return super().parse_args(given, *rest, **kwargs)

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


def _discard_arguments_of_another_class(parser: Any, before: Any, given: Any) -> None:
    """Drop the arguments of the class that a later config or option replaces, unless one of the two extends the other.

    jsonargparse keeps those that the new class accepts too, so that, for example, the template of one data source would
    be applied to another. Lightning's classes are left as they are: the folder and name of a run outlast its logger.
    """
    names = [one["class_path"] for one in (before, given) if one and one.get("class_path")]
    if len(set(names)) == 2 and "init_args" in before:
        old, new = map(resolve_name, names)
        related = inspect.isclass(old) and inspect.isclass(new) and (issubclass(old, new) or issubclass(new, old))
        if not related and not old.__module__.startswith("lightning."):
            before["init_args"] = Namespace()
    _discard_what_the_class_does_not_accept(parser, before, given)


_discard_what_the_class_does_not_accept = _typehints.discard_init_args_on_class_path_change
_typehints.discard_init_args_on_class_path_change = _discard_arguments_of_another_class


def _user_errors_first(subtypes: Any, val: Any, exceptions: list[Exception]) -> NoReturn:
    """Raise what a class says about its arguments where an option has several types; the first one is the cause."""
    ordered = sorted(exceptions, key=lambda one: find_user_error(one) is None)
    _raise_for_all_types(subtypes, val, ordered)


_raise_for_all_types = _typehints.raise_union_unexpected_value
_typehints.raise_union_unexpected_value = _user_errors_first


def _value_as_written(value: Any, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
    """Load the text of an option for what it is; text that no other type of the option accepts stays as it is.

    jsonargparse loads the text of `--data.train.template TEXT` once for `data`, and hands on what Python prints for the
    result. It is only the option itself that knows whether text is expected, and that loads it once more. Text of which
    YAML would leave nothing, a comment, is text.
    """
    if isinstance(value, NestedArg):
        return value, None
    loaded, path = _parse_value(value, *args, **kwargs)
    lost = loaded is None and isinstance(value, str) and value.lstrip().startswith("#")
    return (value, None) if lost else (loaded, path)


_parse_value, _typehints.parse_value_or_config = _typehints.parse_value_or_config, _value_as_written


def _adapt_source(val: Any, typehint: Any, *args: Any, prev_val: Any = None, **kwargs: Any) -> Any:
    """Read a source of prompts without `class_path` as a `PromptFile`, and one given over several by name."""
    if typehint is PromptSource and not kwargs.get("serialize") and not kwargs.get("instantiate_classes"):
        several = isinstance(prev_val, dict | Namespace) and "class_path" not in prev_val and len(prev_val) > 0
        nested = val.key.partition(".")[0] if isinstance(val, NestedArg) else None
        if several and nested is not None:
            names = [name for name in vars(prev_val) if name] if isinstance(prev_val, Namespace) else list(prev_val)
            if nested not in names and "." not in val.key:
                raise UserError(
                    f"{val.key}={val.val} is given for one source, but the config has several by name "
                    f"({', '.join(names)}). Write the name before it, as in {names[0]}.{val.key}, or replace them all "
                    "by a source in a config or in braces: '{path: my.jsonl}'."
                )
        elif several or (prev_val is None and (nested or isinstance(val, dict))):
            prev_val = Namespace(class_path="datamodules.prompts.PromptFile")
    return _adapt_value(val, typehint, *args, **kwargs | {"prev_val": prev_val})


def _update(self: Namespace, value: Any, key: str | None = None, only_unset: bool = False) -> Namespace:
    """Put a class in the place of a mapping, of which jsonargparse would keep a part."""
    for branch, one in value.items(branches=True) if isinstance(value, Namespace) and not only_unset else ():
        name = f"{key}.{branch}" if key else branch
        if isinstance(one, Namespace) and isinstance(self.get(name), dict):
            self[name] = Namespace()
    return _update_parts(self, value, key, only_unset)


_update_parts, Namespace.update = Namespace.update, _update  # type: ignore[method-assign]
_adapt_value = _typehints.adapt_typehints
_typehints.adapt_typehints = _adapt_source


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
    rank = f"rank {dist.get_rank()}:" if dist.is_available() and dist.is_initialized() else ""
    line = " ".join(message.split())
    line = line if len(line) <= _MAX_LINE else f"{line[: _MAX_LINE // 2]} ... {line[-_MAX_LINE // 2 :]}"
    line = "".join(one if one.isprintable() else one.encode("unicode_escape").decode() for one in line)
    print(*filter(None, ["dots: error:", rank, line]), file=sys.stderr, flush=True)
    raise SystemExit(code)


def find_user_error(error: BaseException | None) -> UserError | None:
    """Return the first UserError among an exception, its causes and the exceptions it was raised in handling."""
    return next((each for each in chain(error) if isinstance(each, UserError)), None)
