"""Arguments of a run from Python: the objects, or what a config has in their places."""

from __future__ import annotations

from typing import TypeVar

from jsonargparse import ArgumentError, ArgumentParser

from datamodules.errors import UserError

_Kind = TypeVar("_Kind")


def options_of(kind: type[_Kind], name: str, given: object) -> _Kind:
    """Return an argument of `GRPOModule` as an object.

    Args:
        kind: the class of the argument.
        name: its name.
        given: an object of the class, a dict of its options, or the path of a policy.

    Raises:
        UserError: it is something else, or an option is wrong.
    """
    if isinstance(given, kind):
        return given
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument(f"--{name}", type=kind)
    try:
        wanted = {"path": given} if isinstance(given, str) and name == "policy" else given
        found: _Kind = parser.instantiate(parser.parse_object({name: wanted}))[name]
        return found
    except (ArgumentError, TypeError) as error:
        expected = f"{kind.__module__}.{kind.__name__}"
        raise UserError(
            f"GRPOModule was given {name}={given!r}, expected {expected} or a dict of its options "
            f"({' '.join(str(error).split())})."
        ) from error
