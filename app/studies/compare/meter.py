"""How far a comparison is, and how long it will take yet."""

from __future__ import annotations

import re
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

_STEP = re.compile(rb"step (\d+)/(\d+) ")
_TAIL_BYTES = 4096


def seconds_left(
    finished: Mapping[str, Sequence[float]], waiting: Sequence[str], current: str, elapsed: float, share: float
) -> float | None:
    """Expected seconds until all runs are done; None while there is nothing to go by.

    A run takes as long as the finished ones of its arm did on the mean, else as all finished ones, else as the current
    one is expected to from the share of it that is done.

    Args:
        finished: seconds of finished runs by arm.
        waiting: arms of the runs that have not begun.
        current: arm of the run at work.
        elapsed: its seconds so far.
        share: of its steps that are done, in [0, 1].
    """
    every = [seconds for runs in finished.values() for seconds in runs]
    if not every and not share:
        return None
    usual = sum(every) / len(every) if every else elapsed / share
    means = {arm: sum(runs) / len(runs) for arm, runs in finished.items() if runs}
    return max(0.0, means.get(current, usual) - elapsed) + sum(means.get(arm, usual) for arm in waiting)


def clock(seconds: float | None) -> str:
    """`1:02:03`, or `?`."""
    if seconds is None:
        return "?"
    whole = round(seconds)
    return f"{whole // 3600}:{whole // 60 % 60:02d}:{whole % 60:02d}"


class Meter:
    """A progress bar over the runs on a terminal, a line per run elsewhere."""

    def __init__(self, total: int) -> None:
        self._console = Console(stderr=True)
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("runs"),
            TimeElapsedColumn(),
            TextColumn("left {task.fields[left]}"),
            console=self._console,
            disable=not self._console.is_terminal,
        )
        self._task = self._bar.add_task("", total=total, left="?")
        self._finished: defaultdict[str, list[float]] = defaultdict(list)
        self._waiting: list[str] = []
        self._arm, self._label, self._started = "", "", 0.0
        self._log, self._log_start = Path(), 0

    def __enter__(self) -> Meter:
        self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._bar.stop()

    def known(self, arm: str, seconds: float) -> None:
        """Counts a run that had been finished before."""
        self._finished[arm].append(seconds)
        self._bar.advance(self._task)

    def begin(self, arm: str, seed: int, waiting: Sequence[str], log: Path) -> None:
        """A run begins; `waiting` are the arms of those after it, `log` is what it prints to."""
        self._arm, self._label, self._waiting = arm, f"{arm} seed {seed}", list(waiting)
        self._started, self._log = time.monotonic(), log
        self._log_start = log.stat().st_size if log.exists() else 0
        self.tick()

    def tick(self) -> None:
        """Shows how far the run at work is."""
        share = share_done(self._log, self._log_start)
        left = seconds_left(self._finished, self._waiting, self._arm, time.monotonic() - self._started, share)
        self._bar.update(self._task, description=f"{self._label} {share:.0%}", left=clock(left))

    def end(self, what: str) -> None:
        """The run at work has ended; `what` says with what result."""
        elapsed = time.monotonic() - self._started
        self._finished[self._arm].append(elapsed)
        self._bar.advance(self._task)
        left = sum(sum(runs) / len(runs) for arm in self._waiting if (runs := self._finished.get(arm) or self._all()))
        self._console.print(
            f"{self._label}: {what}, {clock(elapsed)}; about {clock(left)} left", highlight=False, soft_wrap=True
        )

    def _all(self) -> list[float]:
        return [seconds for runs in self._finished.values() for seconds in runs]


def share_done(log: Path, start: int) -> float:
    """Share of its optimizer steps that a run has reported as done in its log, from byte `start` on; 0 before any."""
    try:
        with log.open("rb") as file:
            file.seek(max(start, log.stat().st_size - _TAIL_BYTES))
            found = _STEP.findall(file.read())
    except OSError:
        return 0.0
    if not found:
        return 0.0
    done, total = map(int, found[-1])
    return min(1.0, done / total) if total else 0.0
