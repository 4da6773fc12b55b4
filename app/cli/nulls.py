"""The check of options that are null, or no options where a group is meant: jsonargparse takes both for any option."""

from __future__ import annotations

import dataclasses
import inspect
import types
import typing
from pkgutil import resolve_name
from typing import Any

from jsonargparse import Namespace
from lightning.pytorch import Trainer

from datamodules.errors import UserError

_NEEDED = ("trainer", "seed_everything")
"""Options of a run that have a default and no `class_path`, and can't be null."""


def check_nulls(config: Namespace) -> None:
    """Raise UserError for an option of a parsed config whose annotation allows no null but that is null.

    An option whose default is None may be null whatever its annotation. A group of options, annotated by a dataclass,
    may be nothing but options either.
    """
    for option, one in vars(config).items():
        if one is None and option in _NEEDED:
            raise UserError(f"{option} is null. Leave it out for its default.")
        _check(option, one, Trainer if option == "trainer" else None)


def _check(name: str, value: Any, kind: Any) -> None:
    """Check what a config gives for a dotted name; `kind`: the class of it, where no `class_path` tells another."""
    if isinstance(value, list | tuple):
        for number, one in enumerate(value):
            _check(f"{name}[{number}]", one, None)
        return
    if not isinstance(value, Namespace | dict):
        return
    items = vars(value) if isinstance(value, Namespace) else value
    if isinstance(path := items.get("class_path"), str):
        try:
            kind, items = resolve_name(path), items.get("init_args") or {}
        except (ImportError, AttributeError, ValueError):
            return  # under a key that is no option, which is told later
        items = vars(items) if isinstance(items, Namespace) else items
    hints, defaults = _signature(kind)
    for option, one in items.items():
        full, hint = f"{name}.{option}", hints.get(option)
        group = _dataclass_of(hint)
        if option in hints and defaults.get(option) is not None and one is None and not _allows_none(hint):
            raise UserError(f"{full} is null, expected {_described(hint)}. Leave {option} out for its default.")
        if group is not None and isinstance(one, bool | int | float | str):
            raise UserError(f"{full} is {one}, expected {_described(group)}. Write them below it, by name.")
        _check(full, one, group)


def _signature(kind: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the annotations of a class's arguments, or a function's, and the defaults; none that can't be resolved."""
    try:
        parameters = inspect.signature(kind.__init__ if inspect.isclass(kind) else kind, eval_str=True).parameters
    except (NameError, AttributeError, SyntaxError, TypeError, ValueError):
        return {}, {}  # annotations that only type checkers can read, or code in C
    hints = {name: one.annotation for name, one in parameters.items() if one.annotation is not one.empty}
    return hints, {name: one.default for name, one in parameters.items() if one.default is not one.empty}


def _members(hint: Any) -> tuple[Any, ...]:
    is_union = typing.get_origin(hint) in (typing.Union, types.UnionType)
    return typing.get_args(hint) if is_union else (hint,)


def _allows_none(hint: Any) -> bool:
    return any(one in (None, type(None), Any, object) or isinstance(one, typing.TypeVar) for one in _members(hint))


def _dataclass_of(hint: Any) -> type | None:
    """Return the dataclass that a group of options is annotated by, if there is nothing else it may be."""
    rest = [one for one in _members(hint) if one is not type(None)]
    return rest[0] if len(rest) == 1 and dataclasses.is_dataclass(rest[0]) and isinstance(rest[0], type) else None


def _described(hint: Any) -> str:
    if (group := _dataclass_of(hint)) is not None:
        return f"options ({', '.join(one.name for one in dataclasses.fields(group))})"
    if typing.get_origin(hint) is typing.Literal:
        return f"one of {', '.join(map(str, typing.get_args(hint)))}"
    return " or ".join(_described(one) for one in members) if len(members := _members(hint)) > 1 else _named(hint)


def _named(hint: Any) -> str:
    return hint.__name__ if inspect.isclass(hint) and not typing.get_args(hint) else str(hint).replace("typing.", "")
