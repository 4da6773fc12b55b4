"""A first-in, first-out store of rollout groups with one entry per prompt."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from typing import Any

import numpy as np

from callbacks.group_codec import pack_groups, unpack_groups
from datamodules.pool import PromptPool
from datamodules.types import RolloutGroup


class ReplayBuffer:
    """Rollout replay's memory (arXiv 2506.05316, algorithm 1): the newest `capacity` groups, the newest per prompt.

    Args:
        capacity: groups kept, `C`.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self._groups: OrderedDict[str, RolloutGroup] = OrderedDict()

    def __len__(self) -> int:
        return len(self._groups)

    @property
    def groups(self) -> list[RolloutGroup]:
        """Oldest first."""
        return list(self._groups.values())

    def insert(self, groups: Iterable[RolloutGroup]) -> None:
        """Takes groups in; an older entry of the same prompt goes, then the oldest entries beyond the capacity."""
        for group in groups:
            self._groups.pop(group.prompt.id, None)
            self._groups[group.prompt.id] = group
        while len(self._groups) > self.capacity:
            self._groups.popitem(last=False)

    def draw(self, n: int, generator: np.random.Generator) -> list[RolloutGroup]:
        """`min(n, len(self))` different groups, uniformly; they stay in the buffer."""
        stored = self.groups
        if not stored:
            return []
        picked = generator.choice(len(stored), size=min(n, len(stored)), replace=False)
        return [stored[index] for index in picked]

    def state_dict(self) -> dict[str, Any]:
        return pack_groups(self.groups)

    def load_state_dict(self, state: dict[str, Any], pool: PromptPool) -> None:
        self._groups = OrderedDict((group.prompt.id, group) for group in unpack_groups(state, pool))
