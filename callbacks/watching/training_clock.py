"""The clock by which runs are compared: seconds of training, without what only watches or keeps it."""

from __future__ import annotations

import time


class TrainingClock:
    """Wall-clock seconds of steps, laid end to end.

    A step lasts from the end of the one before it to its own: choosing, rolling out (references and groups that a
    filter drops included), scoring, updating, pushing weights, and what the callbacks do meanwhile. Validation and
    checkpoints are left out, and so are start-up and whatever a kill threw away: a resumed run goes on from the clock
    of its checkpoint.

    Attributes:
        seconds: up to the end of the last step.
    """

    def __init__(self) -> None:
        self.seconds = 0.0
        self._started = time.perf_counter()
        self._owed = 0.0

    def start(self) -> None:
        """The next step is measured from now on."""
        self._started = time.perf_counter()

    def add(self, seconds: float) -> None:
        """Counts seconds to the step in progress that lay outside of it; negative ones are taken off."""
        self._owed += seconds

    def lap(self) -> float:
        """Ends a step and returns its seconds; the next one begins."""
        now = time.perf_counter()
        elapsed = max(0.0, now - self._started + self._owed)
        self._started, self._owed = now, 0.0
        self.seconds += elapsed
        return elapsed
