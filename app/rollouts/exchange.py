"""Exchange of the ranks' rollouts as compact arrays and JSON in one message, without pickle."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from hashlib import blake2b

import numpy as np
import torch
from safetensors.torch import load, save

from app.ranks import Ranks
from datamodules.errors import UserError
from datamodules.group_codec import pack_groups, unpack_groups
from datamodules.ledger import Ledger, WeightedMean
from datamodules.pool import PromptPool
from datamodules.types import Prompt, RolloutGroup


@dataclass(frozen=True, slots=True, eq=False)
class Rolled:
    """Rollouts of some prompts.

    Attributes:
        groups: one per prompt, in order.
        counts: for the ledger, by name.
        logged: metrics that reward functions logged, by `<reward name>/<metric>`.
    """

    groups: list[RolloutGroup] = field(default_factory=list)
    counts: Mapping[str, int] = field(default_factory=dict)
    logged: Mapping[str, WeightedMean] = field(default_factory=dict)

    def joined(self, later: Rolled) -> Rolled:
        """Return these rollouts followed by others."""
        logged = Ledger()
        for name, mean in (*self.logged.items(), *later.logged.items()):
            logged.average(name, mean)
        counts = Counter(self.counts)
        counts.update(later.counts)
        return Rolled([*self.groups, *later.groups], counts, logged.reward_metrics)

    def account(self, ledger: Ledger) -> list[RolloutGroup]:
        """Add counts and metrics to a ledger and return the groups."""
        for name, amount in self.counts.items():
            ledger.count(name, amount)
        for name, mean in self.logged.items():
            ledger.average(name, mean)
        return self.groups


def exchange(ranks: Ranks, prompts: Sequence[Prompt], shares: Sequence[Sequence[int]], mine: Rolled) -> Rolled:
    """Return the rollouts of all prompts, in their order, on every rank.

    Args:
        ranks: the processes.
        prompts: `B` prompts that were requested; the same on all ranks.
        shares: positions of the prompts that each rank has rolled out.
        mine: the rollouts of this rank's share.

    Raises:
        UserError: the ranks requested different prompts.
        LostRankError: see `Ranks.barrier`.
    """
    asked = blake2b("\n".join(prompt.id for prompt in prompts).encode(), digest_size=16).hexdigest()
    packed = pack_groups(mine.groups)
    arrays = packed.pop("arrays")
    header = {
        "asked": asked,
        "groups": packed,
        "counts": dict(mine.counts),
        "logged": dict(mine.logged),
        "extras": [dict(group.extras) for group in mine.groups],
    }
    text = np.frombuffer(json.dumps(header).encode(), dtype=np.uint8).copy()
    messages = ranks.gather(save(arrays | {"header": torch.from_numpy(text)}), "rollouts")
    groups: list[RolloutGroup | None] = [None] * len(prompts)
    counts: Counter[str] = Counter()
    logged = Ledger()
    for rank, (message, share) in enumerate(zip(messages, shares, strict=True)):
        arrays = load(message)
        header = json.loads(arrays.pop("header").numpy().tobytes())
        if header["asked"] != asked:
            raise UserError(
                f"Rank {rank} and rank {ranks.rank} chose different prompts, expected the same ones. Use the same "
                "data, configuration and package versions on all ranks."
            )
        pool = PromptPool.of([prompts[position] for position in share])
        unpacked = unpack_groups(header["groups"] | {"arrays": arrays}, pool)
        for position, group, extras in zip(share, unpacked, header["extras"], strict=True):
            groups[position] = replace(group, extras=extras)
        counts.update(header["counts"])
        for name, mean in header["logged"].items():
            logged.average(name, WeightedMean(*mean))
    return Rolled([group for group in groups if group is not None], counts, logged.reward_metrics)
