"""Account of one step: seconds, counts, and the metrics that reward functions logged."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

PHASES = ("select", "rollout", "reference", "reward", "update", "sync", "validate", "checkpoint")
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


class Ledger:
    """Seconds by phase, counts by name, and reward metrics by name.

    Phases do not overlap: the seconds of an inner phase are subtracted from the outer one.

    Attributes:
        seconds: by phase, one of `PHASES`.
        counts: by name.
        reward_metrics: values given to `log_metric`, by `<reward name>/<metric>`, averaged over completions.
    """

    def __init__(self) -> None:
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self.counts: defaultdict[str, float] = defaultdict(float)
        self.reward_metrics: defaultdict[str, WeightedMean] = defaultdict(WeightedMean)
        self._inner: list[float] = []

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Time the block under `name`. Raises KeyError unless it is one of `PHASES`."""
        if name not in PHASES:
            raise KeyError(f"phase {name!r}, expected one of {PHASES}")
        started = time.perf_counter()
        self._inner.append(0.0)
        try:
            yield
        finally:
            elapsed = time.perf_counter() - started
            self.seconds[name] += elapsed - self._inner.pop()
            if self._inner:
                self._inner[-1] += elapsed

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
