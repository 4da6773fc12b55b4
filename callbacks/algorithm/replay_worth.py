"""The running worth of replayed groups against the worth from which replay saves time."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import astuple, dataclass
from typing import Any

import numpy as np

from datamodules.types import GroupSketch

WINDOW = 32
"""Steps that the running figures are about: those with a measurement."""
ENOUGH = 8
"""Measurements before the share follows them."""
PROBE_EVERY = 16
"""Steps between two probes of one replayed group while nothing else is replayed."""
_STRIDES = 4
"""Steps from a share of 0 to the largest one."""


def agreement(replayed: np.ndarray, fresh: np.ndarray) -> tuple[float, float]:
    """Return the mean inner products of replayed with fresh groups, and of fresh groups with one another.

    Both are over all pairs of different groups. Leaving out a group's product with itself makes the second free of the
    bias by noise that the squared norm of a mean has: `(<S, S> - sum <x, x>) / (n (n - 1))`. The first over the second
    is the worth of a replayed group to first order.

    Args:
        replayed: `[M, P]` gradients or sketches of at least one replayed group.
        fresh: `[N, P]`, of at least two fresh groups.
    """
    replayed, fresh = replayed.astype(np.float64), fresh.astype(np.float64)
    total, count = fresh.sum(0), len(fresh)
    across = float(total @ total) - float(np.square(fresh).sum())
    return float(replayed.mean(0) @ total) / count, across / (count * (count - 1))


def ratio(pairs: Sequence[Sequence[float]]) -> tuple[float, float]:
    """Return the ratio of the sums of pairs, and its jackknife standard error; NaN for one pair."""
    numbers = np.asarray(pairs, dtype=np.float64).reshape(-1, 2)

    def of(above: float, below: float) -> float:
        return float(above / below) if below else math.nan

    total = numbers.sum(0)
    if len(numbers) < 2:
        return of(*total), math.nan
    without = np.array([of(*(total - one)) for one in numbers])
    error = math.sqrt((len(numbers) - 1) / len(numbers) * float(np.square(without - without.mean()).sum()))
    return of(*total), error


@dataclass(frozen=True, slots=True)
class Cost:
    """What the groups of some steps took.

    Attributes:
        generating: seconds to generate and score groups.
        generated: number of these groups.
        informative: those among them whose rewards differ.
        updating: seconds of updates.
        updated: groups that they have read.
    """

    generating: float
    generated: float
    informative: float
    updating: float
    updated: float

    def threshold(self, *, reads_silent: bool = False) -> float:
        """Return the worth above which a replayed group saves time; NaN if nothing was generated or updated.

        A replayed group costs an update `c_u`. A fresh informative one also costs the generation of `1 / y` groups, `y`
        the informative share: `v* = 1 / (1 + c_g / (y c_u))`. Where updates read silent groups too (a KL or entropy
        term), it costs that of `1 / y` updates as well: `v* = y / (1 + c_g / c_u)`.
        """
        if not self.generated or not self.updated or not self.updating:
            return math.nan
        share, update = self.informative / self.generated, self.updating / self.updated
        generation = self.generating / self.generated
        if reads_silent:
            return share * update / (update + generation)
        return share * update / (share * update + generation) if share else 0.0


class ReplayWorth:
    """Follows what replayed groups are worth, and sets their share of the batches.

    The share rises while the worth is above the threshold by more than its standard error, and falls while it is below.
    It begins at 0: single groups are replayed until there are `ENOUGH` measurements, and one every `PROBE_EVERY` steps
    as long as replay does not pay.

    Attributes:
        share: of a batch, as a fraction of the largest share.
    """

    def __init__(self) -> None:
        self.share = 0.0
        self._products: deque[tuple[float, float]] = deque(maxlen=WINDOW)
        self._costs: deque[tuple[float, ...]] = deque(maxlen=WINDOW)

    @property
    def measurements(self) -> int:
        """Measurements of the worth within the window."""
        return len(self._products)

    def worth(self) -> tuple[float, float]:
        """Return the worth of a replayed group as a share of a fresh informative one's, and its standard error."""
        return ratio(self._products) if self._products else (math.nan, math.nan)

    def cost(self) -> Cost:
        """Return the sums over the steps of the window."""
        return Cost(*np.sum(self._costs, axis=0).tolist()) if self._costs else Cost(0, 0, 0, 0, 0)

    def observe(self, sketches: Sequence[GroupSketch], cost: Cost, *, reads_silent: bool) -> None:
        """Take in a step's sketches and costs, and change the share if the step has measured the worth."""
        self._costs.append(astuple(cost))
        moving = [one for one in sketches if one.vector.any()]
        replayed = [one.vector for one in moving if one.source == "replay"]
        fresh = [one.vector for one in moving if one.source != "replay"]
        if not replayed or len(fresh) < 2:
            return
        self._products.append(agreement(np.stack(replayed), np.stack(fresh)))
        worth, error = self.worth()
        threshold = self.cost().threshold(reads_silent=reads_silent)
        if self.measurements >= ENOUGH:
            if worth - error > threshold:
                self.share = min(1.0, self.share + 1 / _STRIDES)
            elif not worth > threshold:
                self.share = max(0.0, self.share - 1 / _STRIDES)

    def groups(self, most: int, step: int) -> int:
        """Return the number of groups to replay in a step, of at most `most`."""
        if self.share > 0:
            return max(1, round(self.share * most)) if most else 0
        return min(most, int(self.measurements < ENOUGH or step % PROBE_EVERY == 0))

    def state_dict(self) -> dict[str, Any]:
        return {"share": self.share, "products": list(self._products), "costs": list(self._costs)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.share = state["share"]
        self._products.clear()
        self._products.extend(tuple(one) for one in state["products"])
        self._costs.clear()
        self._costs.extend(tuple(one) for one in state["costs"])
