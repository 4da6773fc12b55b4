"""Check of what a reward returns."""

from __future__ import annotations

import reprlib
from collections.abc import Iterable, Mapping, Set
from typing import SupportsFloat

from app.rewards.base import ScoreError, Scores
from app.rewards.workers.task import MAX_SCORE


def shape_error(returned: object, count: int) -> str | None:
    """Return what is wrong with a result that is not an ordered collection of `count` values."""
    expected = f"expected a list of {count} numbers or None"
    if not isinstance(returned, Iterable) or isinstance(returned, str | bytes | Mapping | Set):
        return f"returned {type(returned).__name__}, {expected}"
    try:
        size = len(returned)  # type: ignore[arg-type]  # checked by the call itself
    except TypeError:
        return f"returned {type(returned).__name__} without a length, {expected}"
    return None if size == count else f"returned {size} scores for {count} completions"


def value_error(value: object) -> str | None:
    """Return what is wrong with a value that is neither a number nor None."""
    if isinstance(value, ScoreError):
        return str(value)
    if value is None or (isinstance(value, SupportsFloat) and not isinstance(value, str)):
        return None
    return f"returned {reprlib.repr(value)}, expected a finite number or None"


def checked(returned: object, count: int) -> tuple[Scores, dict[int, str]]:
    """Return `count` scores, None where the returned value is invalid, and an error message by position.

    Valid are numbers of at most `MAX_SCORE` and None. If the result is no collection of `count` values, all positions
    are invalid.
    """
    wrong = shape_error(returned, count)
    if wrong is not None:
        return [None] * count, dict.fromkeys(range(count), wrong)
    scores: Scores = []
    errors: dict[int, str] = {}
    for position, item in enumerate(returned):  # type: ignore[arg-type, var-annotated]  # as just checked
        value, error = None, value_error(item)
        if item is not None and error is None:
            try:
                value = float(item)
            except Exception:  # noqa: BLE001 (several elements, beyond a float, or a user's class)
                value = float("nan")
            if value != value or abs(value) == float("inf"):
                error = f"returned {reprlib.repr(item)}, expected a finite number or None"
            elif abs(value) > MAX_SCORE:
                error = (
                    f"returned {value:g}, but float32 arithmetic needs scores of at most {MAX_SCORE:g} in magnitude. "
                    "Divide this reward's scores by a constant"
                )
        if error is not None:
            value, errors[position] = None, error
        scores.append(value)
    return scores, errors
