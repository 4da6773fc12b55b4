"""First-in, first-out buffer of rollout groups with one entry per prompt."""

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
    """Return the relative probability with which `draw: advantage` draws a group of these rewards `[G]`.

    This is the mean squared advantage before any division by a standard deviation, `mean_g (r_g - mean r)^2`, to which
    the expected squared gradient of a prompt is proportional (DOTS, arXiv 2506.05316, theorem 1). Fatemi (arXiv
    2601.02648) uses it as a replay priority in GRPO. Equal rewards have a weight of exactly 0.
    """
    if not len(rewards) or np.ptp(rewards) <= REWARD_TOLERANCE:
        return 0.0
    return float(np.var(rewards, dtype=np.float64))


class ReplayBuffer:
    """Buffer of rollout replay (arXiv 2506.05316, algorithm 1): the newest `capacity` groups, the newest per prompt.

    A prompt's older entry goes before the buffer is cut to its capacity. The authors' code cuts first, and so may keep
    fewer and other groups.

    Args:
        capacity: number of groups kept, `C`.
        max_bytes: limit in bytes of their arrays; None for no limit. Prompts belong to the pool and do not count.
        max_age: age limit in steps since generation; None for no limit.
        draw_by: "uniform", or "advantage": in proportion to `draw_weight`.
        logprob_dtype: dtype of the stored behaviour log-probabilities; see `group_codec.pack` for the error of float16.

    Attributes:
        nbytes: number of bytes of all stored arrays.
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
        self.nbytes = 0

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def groups(self) -> list[RolloutGroup]:
        """The stored groups, oldest first."""
        return [unpack(entry) for entry in self._entries.values()]

    def insert(self, groups: Iterable[RolloutGroup]) -> list[RolloutGroup]:
        """Store groups one after the other, replacing entries of the same prompt and evicting the oldest entries.

        Returns:
            Groups that are not stored because each alone is larger than `max_bytes`.
        """
        refused = []
        for group in groups:
            self.discard([group.prompt.id])
            entry = pack(group, self.logprob_dtype)
            if self.max_bytes is not None and entry.nbytes > self.max_bytes:
                refused.append(group)
                continue
            self._add(entry)
            while len(self) > self.capacity or (self.max_bytes is not None and self.nbytes > self.max_bytes):
                self._remove(next(iter(self._entries)))
        return refused

    def discard(self, prompt_ids: Iterable[str]) -> int:
        """Remove the entries of these prompts and return their number."""
        found = set(prompt_ids) & self._entries.keys()
        for name in found:
            self._remove(name)
        return len(found)

    def expire(self, step: int) -> int:
        """Remove the entries that are older than `max_age` in this step and return their number."""
        if self.max_age is None:
            return 0
        return self.discard([name for name, entry in self._entries.items() if step - entry.birth_step > self.max_age])

    def draw(self, n: int, generator: np.random.Generator, last: Collection[str] = ()) -> list[RolloutGroup]:
        """Draw `min(n, len(self))` different groups, which stay in the buffer.

        Groups of the prompts in `last` are drawn only when there are no others. With `draw_by` "advantage", each next
        group is drawn with a probability proportional to its weight among the remaining ones; groups of weight 0 are
        drawn when no others remain.
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

    def _add(self, entry: PackedGroup) -> None:
        self._entries[entry.prompt.id] = entry
        self.nbytes += entry.nbytes

    def _remove(self, name: str) -> None:
        self.nbytes -= self._entries.pop(name).nbytes

    def state_dict(self) -> dict[str, Any]:
        return join(list(self._entries.values()))

    def load_state_dict(self, state: dict[str, Any], pool: PromptPool) -> None:
        """Restore all entries. Limits that are now lower take effect with the next insertion."""
        self._entries, self.nbytes = OrderedDict(), 0
        for entry in split(state, pool, self.logprob_dtype):
            self._add(entry)
