"""The check that no group of options is null, which jsonargparse accepts and then fails to build."""

from __future__ import annotations

import dataclasses
import inspect
from pkgutil import resolve_name
from typing import Any

from jsonargparse import Namespace

from datamodules.errors import UserError


def check_null_groups(config: Any, name: str = "") -> None:
    """Raise UserError for a null in a parsed config where a class takes a dataclass of options that has a default."""
    if isinstance(config, list | tuple):
        for number, one in enumerate(config):
            check_null_groups(one, f"{name}[{number}]")
    if not isinstance(config, Namespace | dict):
        return
    items = vars(config) if isinstance(config, Namespace) else config
    if isinstance(path := items.get("class_path"), str) and "init_args" in items:
        for option, parameter in inspect.signature(resolve_name(path)).parameters.items():
            if dataclasses.is_dataclass(parameter.default) and items["init_args"].get(option, parameter) is None:
                names = ", ".join(one.name for one in dataclasses.fields(parameter.default))
                raise UserError(
                    f"{name}.{option} is null, but {path} takes a group of options there ({names}). Give those that "
                    f"differ from the defaults, or leave {option} out."
                )
    for option, one in items.items():
        inner = option != "init_args"
        check_null_groups(one, f"{name}.{option}".lstrip(".") if inner else name)
