"""The pool in a new random order, pass after pass."""

from __future__ import annotations

import numpy as np

from datamodules.seeding import generator

_KEPT = 3


class Passes:
    """Orders of the pool, one per pass: derived from (seed, owner, pass), so they need no state of their own.

    Args:
        seed: the run's seed.
        owner: name that keeps the orders of different methods apart.
        size: prompts in the pool, `Q`.
    """

    def __init__(self, seed: int, owner: str, size: int) -> None:
        self._seed, self._owner, self._size = seed, owner, size
        self._ranks: dict[int, np.ndarray] = {}

    def ranks(self, number: int) -> np.ndarray:
        """int64 `[Q]`: the place of every prompt in the order of pass `number`; the latest few are kept."""
        if number not in self._ranks:
            order = generator(self._seed, self._owner, "pass", number).permutation(self._size)
            ranks = np.empty_like(order)
            ranks[order] = np.arange(self._size)
            latest = sorted(self._ranks)[-(_KEPT - 1) :]
            self._ranks = {each: self._ranks[each] for each in latest} | {number: ranks}
        return self._ranks[number]
