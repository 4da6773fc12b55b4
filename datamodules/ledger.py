"""Account of one step: seconds, counts, and the metrics that reward functions logged."""

from __future__ import annotations

import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, Protocol

PHASES = ("select", "rollout", "environment", "reference", "reward", "update", "sync", "validate", "checkpoint")
STEP_PHASES = tuple(phase for phase in PHASES if phase not in ("validate", "checkpoint"))
"""Phases that belong to a step; the others lie between steps."""


class WeightedMean(NamedTuple):
    """Sums from which a weighted mean is computed.

    Attributes:
        total: sum of values times weights.
        weight: sum of the weights.
    """

    total: float = 0.0
    weight: float = 0.0

    @property
    def value(self) -> float:
        """The mean; NaN without any weight."""
        return self.total / self.weight if self.weight else float("nan")

    def merge(self, other: WeightedMean) -> WeightedMean:
        """Return the mean over the values of both."""
        return WeightedMean(self.total + other.total, self.weight + other.weight)


class Clock(Protocol):
    """Takes moments, and later tells the seconds between two of them."""

    def moment(self) -> Any:
        """Return a mark of the present moment. Does not wait for anything."""

    def seconds(self, start: Any, end: Any) -> float:
        """Return the seconds between two marks; may wait until the later one is past."""


class WallClock:
    """Moments of the host."""

    def moment(self) -> float:
        return time.perf_counter()

    def seconds(self, start: float, end: float) -> float:
        return end - start


class CudaClock:
    """Moments at which a GPU has done all that the host had given it (CUDA events on the current stream).

    A host runs ahead of its GPU: by its own clock, work is over when it is launched.
    """

    def moment(self) -> Any:
        import torch

        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds(self, start: Any, end: Any) -> float:
        end.synchronize()
        return float(start.elapsed_time(end)) / 1000


def clock_of_process() -> Clock:
    """Return the clock that is true of this process's work: `CudaClock` if it has used a GPU, else `WallClock`."""
    if "torch" in sys.modules:  # importing it takes seconds, and a process without it has used no GPU
        import torch

        if torch.cuda.is_initialized():
            return CudaClock()
    return WallClock()


class Ledger:
    """Seconds by phase, counts by name, and reward metrics by name.

    Phases do not overlap: the seconds of an inner phase do not count for the outer one.

    Args:
        clock: times the phases; `clock_of_process` by default.

    Attributes:
        counts: by name.
        reward_metrics: values given to `log_metric`, by `<reward name>/<metric>`, averaged over completions.
    """

    def __init__(self, clock: Clock | None = None) -> None:
        self.counts: defaultdict[str, float] = defaultdict(float)
        self.reward_metrics: defaultdict[str, WeightedMean] = defaultdict(WeightedMean)
        self._clock = clock or clock_of_process()
        self._seconds: defaultdict[str, float] = defaultdict(float)
        self._phases: list[str] = []  # entered and not left, the innermost last
        self._since: Any = None  # the moment from which the innermost one is not yet timed
        self._timed: list[tuple[str, Any, Any]] = []  # phase, start and end, not yet in `_seconds`

    @property
    def seconds(self) -> defaultdict[str, float]:
        """Seconds by phase, one of `PHASES`. With a GPU, waits until it has done the work of the phases."""
        for name, start, end in self._timed:
            self._seconds[name] += self._clock.seconds(start, end)
        self._timed.clear()
        return self._seconds

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Time the block under `name`. Raises KeyError unless it is one of `PHASES`."""
        if name not in PHASES:
            raise KeyError(f"phase {name!r}, expected one of {PHASES}")
        self._border()
        self._phases.append(name)
        try:
            yield
        finally:
            self._border()
            self._phases.pop()

    def _border(self) -> None:
        """Time the innermost phase up to now, and begin the next time."""
        now = self._clock.moment()
        if self._phases:
            self._timed.append((self._phases[-1], self._since, now))
        self._since = now

    def move(self, seconds: float, source: str, target: str) -> None:
        """Let seconds that were timed as one phase count as another."""
        self.seconds[source] -= seconds
        self.seconds[target] += seconds

    def count(self, name: str, amount: float = 1) -> None:
        """Add an amount to the count of that name."""
        self.counts[name] += amount

    def average(self, name: str, mean: WeightedMean) -> None:
        """Merge a mean into the reward metric of that name."""
        self.reward_metrics[name] = self.reward_metrics[name].merge(mean)

    def add(self, other: Ledger) -> None:
        """Add the content of another ledger to this one."""
        for mine, theirs in ((self.seconds, other.seconds), (self.counts, other.counts)):
            for name, amount in theirs.items():
                mine[name] += amount
        for name, mean in other.reward_metrics.items():
            self.average(name, mean)
