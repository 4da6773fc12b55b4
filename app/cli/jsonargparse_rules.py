"""What jsonargparse does otherwise here than by default, for which it has no public way.

It uses private names of jsonargparse: the loader that `set_loader` replaces (`yaml_load`), what a change of class keeps
(`discard_init_args_on_class_path_change`), which of several types' errors is told (`raise_union_unexpected_value`), how
the text of an option is loaded (`parse_value_or_config`, `NestedArg`), the class that is meant by options alone where
the annotated one is abstract (`adapt_typehints`), what an update keeps of a mapping (`Namespace.update`), and
`indent_text`, which fails for an exception without a message.
"""

from __future__ import annotations

import inspect
import os
from pkgutil import resolve_name
from typing import Any, NoReturn

import yaml
from jsonargparse import Namespace, _typehints, set_loader
from jsonargparse._loaders_dumpers import yaml_load
from jsonargparse._typehints import NestedArg

from app.cli.config_text import check_text
from app.cli.failures import find_user_error
from datamodules.errors import UserError, nearest
from datamodules.prompts import PromptFile, PromptSource
from datamodules.validation import ValidationSet

_SEVERAL = (dict[str, PromptSource], dict[str, PromptSource | ValidationSet])
"""The types of several training sources, and of several validation sets."""

_adapt_value, _discard_what_the_class_does_not_accept = (
    _typehints.adapt_typehints,
    _typehints.discard_init_args_on_class_path_change,
)
_indent_text, _parse_value = _typehints.indent_text, _typehints.parse_value_or_config
_raise_for_all_types, _update_parts = _typehints.raise_union_unexpected_value, Namespace.update


def apply() -> None:
    """Put the rules in force, for all parsers of the process."""
    set_loader("yaml", _load, (yaml.YAMLError,))
    _typehints.adapt_typehints = _adapt_source
    _typehints.discard_init_args_on_class_path_change = _discard_arguments_of_another_class
    _typehints.indent_text = _indented
    _typehints.parse_value_or_config = _value_as_written
    _typehints.raise_union_unexpected_value = _user_errors_first
    Namespace.update = _update  # type: ignore[method-assign]
    # Lightning uses names that jsonargparse has deprecated; the user cannot change that.
    os.environ.setdefault("JSONARGPARSE_DEPRECATION_WARNINGS", "off")


def _load(text: str) -> Any:
    check_text(text)
    return yaml_load(text)


def _indented(text: str, first_line: bool = True) -> str:
    return _indent_text(text or "-", first_line)


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


def _user_errors_first(subtypes: Any, val: Any, exceptions: list[Exception]) -> NoReturn:
    """Raise what a class says about its arguments where an option has several types; the first one is the cause."""
    ordered = sorted(exceptions, key=lambda one: find_user_error(one) is None)
    _raise_for_all_types(subtypes, val, ordered)


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


def _adapt_source(val: Any, typehint: Any, *args: Any, prev_val: Any = None, **kwargs: Any) -> Any:
    """Read a source of prompts without `class_path` as a `PromptFile`, and options by name as several sources."""
    if not kwargs.get("serialize") and not kwargs.get("instantiate_classes"):
        head, dot, rest = val.key.partition(".") if isinstance(val, NestedArg) else ("", "", "")
        if typehint is PromptSource:
            several = _names(prev_val)
            if several and head and not dot and head not in several:
                _check_option("", head, typehint, None)
                raise UserError(
                    f"{val.key}={val.val} is given for one source, but the config has several by name "
                    f"({', '.join(several)}). Write the name before it, as in {several[0]}.{val.key}, or replace them "
                    "all by a source in a config or in braces: '{path: my.jsonl}'."
                )
            if several or (not prev_val and (head or isinstance(val, dict))):
                prev_val = Namespace(class_path="datamodules.prompts.PromptFile")
        elif typehint is ValidationSet:
            val, prev_val = _with_source(val, prev_val)
        elif typehint in _SEVERAL and dot and (_names(prev_val) or head not in _options_of(typehint, prev_val)):
            if not _names(prev_val):
                if prev_val and ("class_path" not in prev_val or _is_given(prev_val)):
                    raise UserError(
                        f"{val.key}={val.val} is given for a source by name, but there is one without a name already. "
                        f"Write a name before all options, as in {head}.path, or replace that source by several in a "
                        f"config or in braces: '{{{head}: {{path: my.jsonl}}}}'."
                    )
                prev_val = {}
            _check_option(f"{head}.", rest.partition(".")[0], typehint, prev_val.get(head))
            others = vars(prev_val) if isinstance(prev_val, Namespace) else prev_val
            val = {**others, head: NestedArg(rest, val.val)}  # jsonargparse takes no options of options
        elif typehint in _SEVERAL and isinstance(val, dict) and not val.keys() & _options_of(typehint, None):
            for name, one in val.items():
                for option in one if isinstance(one, dict) and "class_path" not in one else ():
                    _check_option(f"{name}.", option, typehint, None)
    return _adapt_value(val, typehint, *args, **kwargs | {"prev_val": prev_val})


def _names(before: Any) -> list[str]:
    """Return the names of several sources or sets; none for a single one."""
    if not isinstance(before, dict | Namespace):
        return []
    names = list(vars(before) if isinstance(before, Namespace) else before)
    return [] if {"class_path", "source"} & set(names) else [name for name in names if name]


def _with_source(val: Any, before: Any) -> tuple[Any, Any]:
    """Return the value of a validation set, and the one before it, with options of its source moved into `source`."""
    own = inspect.signature(ValidationSet).parameters.keys()
    if isinstance(before, Namespace) and "class_path" in before and not _is_set(before):
        before = Namespace(source=before)
    if isinstance(val, NestedArg) and before and val.key.partition(".")[0] not in own:
        val = NestedArg(f"source.{val.key}", val.val)
    elif isinstance(val, dict) and "source" not in val and val.keys() & own and "class_path" not in val:
        rest = {name: one for name, one in val.items() if name not in own}
        val = {name: one for name, one in val.items() if name in own} | {"source": rest}
    return val, before


def _check_option(prefix: str, option: str, typehint: Any, before: Any) -> None:
    if option.rstrip("+") not in (options := _options_of(typehint, before)):
        raise UserError(f"{prefix}{option} is not an option of a source of prompts: {nearest(option, options)}")


def _is_given(source: Namespace) -> bool:
    """Return whether a source is another one than that of a run to which none was given."""
    defaults = {name: one.default for name, one in inspect.signature(PromptFile).parameters.items()} | {"path": None}
    return resolve_name(source.class_path) is not PromptFile or any(
        value != defaults[name] for name, value in vars(source.get("init_args") or Namespace()).items()
    )


def _options_of(typehint: Any, before: Any) -> set[str]:
    """Return the options of a source, or of a validation set, whose class is `PromptFile` unless it had another."""
    path = before.get("class_path") if isinstance(before, dict | Namespace) else None
    kind = resolve_name(path) if path else PromptFile
    of_class = inspect.signature(PromptFile if kind is ValidationSet else kind).parameters
    of_set = inspect.signature(ValidationSet).parameters if typehint == _SEVERAL[1] else ()
    return {*of_class, *of_set, "class_path", "init_args", "dict_kwargs"}


def _update(self: Namespace, value: Any, key: str | None = None, only_unset: bool = False) -> Namespace:
    """Put a class in the place of a mapping, and a set in that of a source, of which jsonargparse would keep parts."""
    if isinstance(value, Namespace) and not only_unset:
        parts = [(f"{key}.{branch}" if key else branch, one) for branch, one in value.items(branches=True)]
        for name, one in [(key, value), *parts] if key else parts:
            before = self.get(name)
            if isinstance(one, Namespace) and (isinstance(before, dict) or _is_set(before) < _is_set(one)):
                self[name] = Namespace()
    return _update_parts(self, value, key, only_unset)


def _is_set(value: Any) -> bool:
    return isinstance(value, Namespace) and str(value.get("class_path")).endswith(".ValidationSet")
