"""Where the seconds and the tokens of one step went."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

PHASES = ("select", "rollout", "reference", "reward", "update", "sync", "validate", "checkpoint")


class Ledger:
    """Seconds by phase and counts by name. Phases do not nest: the inner one's time is taken off the outer one's."""

    def __init__(self) -> None:
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self.counts: defaultdict[str, float] = defaultdict(float)
        self._inner: list[float] = []

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Times the block under `name`, one of `PHASES`."""
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
        self.counts[name] += amount

    def add(self, other: Ledger) -> None:
        """Adds another ledger's seconds and counts to this one's."""
        for mine, theirs in ((self.seconds, other.seconds), (self.counts, other.counts)):
            for name, amount in theirs.items():
                mine[name] += amount
