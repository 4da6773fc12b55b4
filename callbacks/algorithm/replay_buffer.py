"""A first-in, first-out store of rollout groups with one entry per prompt."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Iterable, Sequence
from typing import Any, Literal

import numpy as np

from datamodules.group_codec import LogprobDtype, PackedGroup, join, pack, split, unpack
from datamodules.pool import PromptPool
from datamodules.selectors.sampling import gumbel, top_k
from datamodules.types import REWARD_TOLERANCE, RolloutGroup

Draw = Literal["uniform", "advantage"]


def draw_weight(rewards: np.ndarray) -> float:
    """How often a group with these rewards `[G]` is drawn by `draw: advantage`, relative to others.

    The mean squared advantage of its completions, `mean_g (r_g - mean r)^2`, before any division by a standard
    deviation: p (1 - p) for rewards of 0 and 1, to which the expected squared gradient of a prompt is proportional
    (DOTS, arXiv 2506.05316, theorem 1). As a replay priority in GRPO it is that of Fatemi (arXiv 2601.02648), after
    prioritised experience replay (Schaul et al. 2016, arXiv 1511.05952, with exponent 1). Equal rewards weigh
    exactly 0.
    """
    if not len(rewards) or np.ptp(rewards) <= REWARD_TOLERANCE:
        return 0.0
    return float(np.var(rewards, dtype=np.float64))


class ReplayBuffer:
    """Rollout replay's memory (arXiv 2506.05316, algorithm 1): the newest `capacity` groups, the newest per prompt.

    Args:
        capacity: groups kept, `C`.
        max_bytes: bytes of their arrays, at most; None for no bound. Prompts belong to the pool and do not count.
        max_age: steps since its generation at which a group is drawn, at most; None for no bound.
        draw_by: "uniform", or "advantage": in proportion to `draw_weight`.
        logprob_dtype: what behaviour log-probs are kept in; see `group_codec.pack` for what float16 costs.
    """

    def __init__(
        self,
        capacity: int,
        *,
        max_bytes: int | None = None,
        max_age: int | None = None,
        draw_by: Draw = "uniform",
        logprob_dtype: LogprobDtype = "float32",
    ) -> None:
        self.capacity = capacity
        self.max_bytes = max_bytes
        self.max_age = max_age
        self.draw_by = draw_by
        self.logprob_dtype = logprob_dtype
        self._entries: OrderedDict[str, PackedGroup] = OrderedDict()
        self._nbytes = 0

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays kept."""
        return self._nbytes

    @property
    def groups(self) -> list[RolloutGroup]:
        """Oldest first."""
        return [unpack(entry) for entry in self._entries.values()]

    def insert(self, groups: Iterable[RolloutGroup]) -> list[RolloutGroup]:
        """Takes groups in, one after the other: an older entry of its prompt goes, then the oldest entries beyond a
        bound. Returns those that are larger than `max_bytes` by themselves: they are not kept."""
        refused = []
        for group in groups:
            self.discard([group.prompt.id])
            entry = pack(group, self.logprob_dtype)
            if self.max_bytes is not None and entry.nbytes > self.max_bytes:
                refused.append(group)
                continue
            self._add(entry)
            while self._over:
                self._remove(next(iter(self._entries)))
        return refused

    def discard(self, prompt_ids: Iterable[str]) -> int:
        """Drops the entries of these prompts; returns how many there were."""
        found = set(prompt_ids) & self._entries.keys()
        for name in found:
            self._remove(name)
        return len(found)

    def expire(self, step: int) -> int:
        """Drops the entries that are older than `max_age` at a step; returns how many there were."""
        if self.max_age is None:
            return 0
        return self.discard([name for name, entry in self._entries.items() if step - entry.birth_step > self.max_age])

    def draw(self, n: int, generator: np.random.Generator, last: Collection[str] = ()) -> list[RolloutGroup]:
        """`min(n, len(self))` different groups; they stay in the buffer.

        Groups whose prompt's id is in `last` are drawn only when there are no others. By advantage, each next group
        has a probability proportional to its weight among those left; groups of weight 0 come when no others are left.
        """
        stored = list(self._entries.values())
        picked = self._pick([entry for entry in stored if entry.prompt.id not in last], n, generator)
        picked += self._pick([entry for entry in stored if entry.prompt.id in last], n - len(picked), generator)
        return [unpack(entry) for entry in picked]

    def _pick(self, entries: Sequence[PackedGroup], n: int, generator: np.random.Generator) -> list[PackedGroup]:
        size = min(n, len(entries))
        if size <= 0:
            return []
        if self.draw_by == "uniform":
            positions = generator.choice(len(entries), size=size, replace=False)
        else:
            weights = np.array([draw_weight(entry.rewards) for entry in entries])
            with np.errstate(divide="ignore"):
                positions = top_k(gumbel(np.log(weights), generator), size, generator)
        return [entries[position] for position in positions]

    @property
    def _over(self) -> bool:
        return len(self) > self.capacity or (self.max_bytes is not None and self._nbytes > self.max_bytes)

    def _add(self, entry: PackedGroup) -> None:
        self._entries[entry.prompt.id] = entry
        self._nbytes += entry.nbytes

    def _remove(self, name: str) -> None:
        self._nbytes -= self._entries.pop(name).nbytes

    def state_dict(self) -> dict[str, Any]:
        return join(list(self._entries.values()))

    def load_state_dict(self, state: dict[str, Any], pool: PromptPool) -> None:
        """Takes the entries in as they were. Bounds that have become narrower since hold from the next insertion."""
        self._entries, self._nbytes = OrderedDict(), 0
        for entry in split(state, pool, self.logprob_dtype):
            self._add(entry)
