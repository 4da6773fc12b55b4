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
from datamodules.errors import UserError
from datamodules.prompts import PromptSource

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
