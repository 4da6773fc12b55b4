"""The exception for wrong user input. The command prints its one line and exits with code 2."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from importlib.util import find_spec


class UserError(ValueError):
    """Input that cannot be used. The message is one line: what was given, what was expected, what to do."""


def require(package: str) -> None:
    """Raise UserError if a package that the extra of its name installs is not there."""
    if find_spec(package) is None:
        raise UserError(f"{package} is not installed. Run in the folder of Dots: pip install -e '.[{package}]'")


def nearest(given: str, valid: Iterable[str]) -> str:
    """Return a hint that names the element of `valid` closest to `given`, or all of them if none is close."""
    choices = sorted(valid)
    close = difflib.get_close_matches(given, choices, n=1, cutoff=0.5)
    if close:
        return f"did you mean {close[0]!r}?"
    return "choose one of " + ", ".join(repr(choice) for choice in choices)
