"""Several named training sources as one pool, and the share of each step's prompts that a source gets."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import chain
from typing import Literal

import numpy as np

from datamodules.errors import UserError
from datamodules.pool import PromptPool
from datamodules.types import Prompt

Rule = Literal["keep", "floor", "free"]
"""What becomes of the sources' shares of a step's prompts: `keep` keeps them, `floor` gives each source at least its
weight, a fraction of the prompts, and `free` leaves them to the selector."""


class Mixture(PromptPool):
    """The prompts of several sources, one source after the other.

    Args:
        parts: the pools by the name of their source, without ids in common (see `named`).

    Attributes:
        floors: the fraction of a step's prompts that each source gets at least; their sum is at most 1. They are the
            sources' shares where it is 1.
        source_of: int64 `[Q]`, the number of each prompt's source, in the order of `parts`.
    """

    def __init__(self, parts: Mapping[str, PromptPool], floors: Mapping[str, float] | None = None) -> None:
        self.parts = dict(parts)
        self.floors: Mapping[str, float] = floors or dict.fromkeys(parts, 0.0)
        self._pools = list(parts.values())
        self._starts = np.cumsum([0, *map(len, self._pools)])
        self.source_of = np.repeat(np.arange(len(parts)), np.diff(self._starts))
        digests = [pool.digests for pool in self._pools if pool.digests is not None]
        super().__init__(
            self._prompt,
            list(chain.from_iterable(pool.ids for pool in self._pools)),
            _Chained([pool.questions for pool in self._pools]),
            digests=list(chain.from_iterable(digests)) if len(digests) == len(parts) else None,
        )

    def _prompt(self, index: int) -> Prompt:
        source = int(self.source_of[index])
        return replace(self._pools[source][index - int(self._starts[source])], index=index)

    def by_part(self, mask: np.ndarray) -> dict[str, np.ndarray]:
        """Return the parts of a `[Q]` array by the name of their source."""
        return dict(zip(self.parts, np.split(mask, self._starts[1:-1]), strict=True))

    def quotas(self, n: int, owed: np.ndarray, left: np.ndarray) -> np.ndarray:
        """Return how many of the next `n` prompts each source gets at least, int64 `[S]`, and update what is owed.

        Fractions of a prompt carry over: after choices of n_1, n_2, ... prompts, a source has had its share of their
        sum, to within one prompt. What a source lacks goes to the others.

        Args:
            n: number of prompts of the choice.
            owed: float64 `[S]`, prompts that are still due to each source; changed in place.
            left: int64 `[S]`, prompts of each source that can be chosen.
        """
        floors = np.array([self.floors[name] for name in self.parts])
        owed += n * floors
        # A sum of fractions may end just below the whole number it stands for.
        found = np.clip(np.floor(owed + 1e-9).astype(np.int64), 0, left)
        while found.sum() > n:  # fractions of several sources fall due together
            found[np.argmin(np.where(found > 0, owed - found, np.inf))] -= 1
        if np.isclose(floors.sum(), 1.0):
            while found.sum() < min(n, left.sum()):
                found[np.argmax(np.where(found < left, owed - found, -np.inf))] += 1
        owed -= found
        np.clip(owed, -1.0, 1.0, out=owed)
        return found


def named(pool: PromptPool, name: str, rewards: Sequence[str] | None) -> PromptPool:
    """Return the pool of a source or set: prompts that say its name and rewards, and ids `NAME/ID` if it has a name."""
    if not name and rewards is None:
        return pool
    ids = [f"{name}/{one}" for one in pool.ids] if name else pool.ids
    scored_by = None if rewards is None else tuple(rewards)

    def build(index: int) -> Prompt:
        return replace(pool[index], id=ids[index], dataset=name, rewards=scored_by)

    return PromptPool(build, ids, pool.questions, pool.report, pool.digests)


class _Chained(Sequence[str]):
    """Sequences of texts, one after the other, read on demand."""

    def __init__(self, parts: Sequence[Sequence[str]]) -> None:
        self._parts = parts
        self._ends = np.cumsum([len(part) for part in parts])

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, index: int) -> str:  # type: ignore[override]  # positions only, no slices
        place = range(len(self))[index]
        part = int(np.searchsorted(self._ends, place, side="right"))
        return self._parts[part][place - int(self._ends[part])]  # from the end of its part

    def __iter__(self) -> Iterator[str]:
        return chain.from_iterable(self._parts)


def floors_of(rule: Rule, weights: Mapping[str, float | None], parts: Mapping[str, PromptPool]) -> dict[str, float]:
    """Return the least fraction of a step's prompts that each source gets (see `Mixture`).

    Args:
        rule: what becomes of the shares.
        weights: `weight` of each source; None where it has none.
        parts: the sources' pools, whose sizes are the weights where none is given.

    Raises:
        UserError: only some of the sources have a weight under `keep`, none has one under `floor`, or their sum is out
            of range.
    """
    given = {name: weight for name, weight in weights.items() if weight is not None}
    if rule == "free":
        return dict.fromkeys(parts, 0.0)
    if rule == "floor":
        if not given or sum(given.values()) > 1 + 1e-9:
            told = f"sum to {sum(given.values()):g}" if given else "are not set"
            raise UserError(
                "data.mixture is floor, where the weight of a source is the least fraction of a step's prompts that it "
                f"gets, but the weights of data.train {told}. Set weights whose sum is at most 1, or data.mixture=keep."
            )
        return {name: given.get(name, 0.0) for name in parts}
    if given and len(given) < len(parts):
        missing = next(name for name in parts if name not in given)
        raise UserError(
            f"data.train.{missing} has no weight, but {', '.join(given)} {'has' if len(given) == 1 else 'have'} one. "
            "Give every source a weight, or none: then a source's share is its share of all prompts."
        )
    sizes = given or {name: float(len(pool)) for name, pool in parts.items()}
    total = sum(sizes.values())
    if total == 0:
        raise UserError("The weights of data.train are all 0. Give at least one source a positive weight.")
    return {name: sizes[name] / total for name in parts}
