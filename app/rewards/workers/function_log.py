"""What a reward function logs next to its scores."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from app.rewards.workers.task import MAX_METRIC, Loggable

_MAX_NAMES = 100
_MAX_NOTES = 5


class FunctionLog:
    """Collects what a function logs through TRL's two callbacks about the `count` completions of a call.

    What cannot be logged is left out, with a note, since it says nothing about the scores.
    """

    def __init__(self, count: int) -> None:
        self.count = count
        self.extras: dict[str, list[Loggable]] = {}
        self.notes: list[str] = []
        self._metrics: dict[str, list[float]] = {}  # sum and number of the values

    @property
    def metrics(self) -> list[tuple[str, float]]:
        """The mean of the values given for each name."""
        return [(name, total / number) for name, (total, number) in self._metrics.items()]

    def log_metric(self, name: str, value: float) -> None:
        if not self._usable("log_metric", name, self._metrics):
            return
        try:
            number = float(value)
        except (TypeError, ValueError, OverflowError):
            number = math.nan
        if not abs(number) <= MAX_METRIC:
            self._note(f"log_metric({name!r}) got a value that is not a finite number of float32: left out")
            return
        sums = self._metrics.setdefault(name, [0.0, 0])
        sums[0] += number
        sums[1] += 1

    def log_extra(self, column: str, values: Sequence[object]) -> None:
        if len(values) != self.count:
            raise ValueError(f"log_extra({column!r}) got {len(values)} values for {self.count} completions")
        if self._usable("log_extra", column, self.extras):
            self.extras[column] = [_loggable(value) for value in values]

    def _usable(self, function: str, name: object, known: Mapping[str, object]) -> bool:
        if not isinstance(name, str) or not 0 < len(name) <= _MAX_NAMES or not name.isprintable():
            self._note(f"{function} got a name that is not text of 1 to {_MAX_NAMES} printable characters: left out")
            return False
        if name not in known and len(known) >= _MAX_NAMES:
            self._note(f"{function} got more than {_MAX_NAMES} names in one call: the others are left out")
            return False
        return True

    def _note(self, note: str) -> None:
        if note not in self.notes and len(self.notes) < _MAX_NOTES:
            self.notes.append(note)


def _loggable(value: object) -> Loggable:
    """Return a value as the completions table can hold it: as it is, or as text."""
    value = value.item() if isinstance(value, np.generic) else value
    if value is None or isinstance(value, bool | float | str) or (isinstance(value, int) and abs(value) < 2**63):
        return value
    try:
        return str(value)
    except Exception:  # noqa: BLE001 (a user's class, or a number of too many digits)
        return f"<{type(value).__name__}>"
