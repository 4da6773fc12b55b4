"""Two trainers in one process, one step of the one after one of the other, and the clock of each."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass
from pathlib import Path


class OtherFailedError(RuntimeError):
    """The other trainer has failed."""


class Turns:
    """Lets one named thread go on at a time.

    Args:
        first: whose turn it is at the beginning.
    """

    def __init__(self, first: str) -> None:
        self._turn = first
        self._failed = False
        self._changed = threading.Condition()

    def wait(self, name: str) -> None:
        """Returns when it is the turn of `name`. Raises OtherFailedError when another thread has failed."""
        with self._changed:
            self._changed.wait_for(lambda: self._failed or self._turn == name)
            if self._failed:
                raise OtherFailedError

    def give(self, name: str) -> None:
        """Makes it the turn of `name`."""
        with self._changed:
            self._turn = name
            self._changed.notify_all()

    def fail(self) -> None:
        """Ends all waiting."""
        with self._changed:
            self._failed = True
            self._changed.notify_all()


@dataclass(frozen=True, slots=True)
class Step:
    """What one step cost.

    Attributes:
        seconds: of the whole step, wall clock.
        rollout: seconds of generation.
        reward: seconds of scoring.
        update: seconds of log-probabilities, loss, gradients and optimizer.
        completion_tokens: generated.
        peak_mib: highest resident memory of the process over that at the step's start.
    """

    seconds: float
    rollout: float
    reward: float
    update: float
    completion_tokens: int
    peak_mib: float


class Clock:
    """Starts when its side's turn comes and gives the turn on when it stops.

    The sides are set up in turn as well, between `enter` and the first start: models cannot be loaded side by side,
    because transformers switches the whole process to the meta device meanwhile.
    """

    def __init__(self, turns: Turns, mine: str, other: str) -> None:
        self.turns, self.mine, self.other = turns, mine, other
        self.steps: list[Step] = []
        self._set_up = False

    def enter(self) -> None:
        """Before the side is set up."""
        self.turns.wait(self.mine)

    def start(self) -> None:
        if not self._set_up:
            self._set_up = True
            self.turns.give(self.other)
        self.turns.wait(self.mine)
        self._resident = _reset_peak()
        self._started = time.perf_counter()

    def stop(self, *, rollout: float, reward: float, update: float | None, completion_tokens: int) -> None:
        """Notes the step; without a measured update that is what is left of its time."""
        seconds = time.perf_counter() - self._started
        left = seconds - rollout - reward if update is None else update
        peak = _status("VmHWM") - self._resident
        self.steps.append(Step(seconds, rollout, reward, left, completion_tokens, peak))
        self.turns.give(self.other)


def _reset_peak() -> float:
    """Resident memory in MiB, from which on the highest is counted anew (Linux; proc(5), clear_refs)."""
    Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")


def _status(name: str) -> float:
    """A line of /proc/self/status in MiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(f"{name}:")).split()[1]) / 1024
