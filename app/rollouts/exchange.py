"""How the ranks' rollouts become everybody's: compact arrays and JSON in one message, no pickle."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Any

import numpy as np
import torch
from safetensors.torch import load, save

from app.ranks import Ranks
from datamodules.errors import UserError
from datamodules.group_codec import pack_groups, unpack_groups
from datamodules.pool import PromptPool
from datamodules.types import Prompt, RolloutGroup


@dataclass(frozen=True, slots=True, eq=False)
class Rolled:
    """Rollouts of some prompts.

    Attributes:
        groups: one per prompt, in order.
        counts: for the ledger, by name.
        logged: values that reward functions logged, by name.
    """

    groups: list[RolloutGroup] = field(default_factory=list)
    counts: Mapping[str, int] = field(default_factory=dict)
    logged: Mapping[str, list[float]] = field(default_factory=dict)


def exchange(ranks: Ranks, prompts: Sequence[Prompt], shares: Sequence[Sequence[int]], mine: Rolled) -> Rolled:
    """The rollouts of all prompts, in their order, on every rank.

    Args:
        ranks: the processes.
        prompts: `B` that were asked for; the same on all ranks.
        shares: positions of the prompts that each rank has rolled out.
        mine: the rollouts of this rank's share.

    Raises:
        UserError: the ranks did not ask for the same prompts.
        LostRankError: `Ranks.meet`.
    """
    asked = blake2b("\n".join(prompt.id for prompt in prompts).encode(), digest_size=16).hexdigest()
    messages = ranks.gather(_encode(asked, mine), "rollouts")
    groups: list[RolloutGroup | None] = [None] * len(prompts)
    counts: Counter[str] = Counter()
    logged: dict[str, list[float]] = {}
    for rank, (message, share) in enumerate(zip(messages, shares, strict=True)):
        header, arrays = _decode(message)
        if header["asked"] != asked:
            raise UserError(
                f"rank {rank} and rank {ranks.rank} chose different prompts: expected the same data, configuration "
                "and package versions on all ranks"
            )
        pool = PromptPool.of([prompts[position] for position in share])
        for position, group in zip(share, unpack_groups(header["groups"] | {"arrays": arrays}, pool), strict=True):
            groups[position] = group
        counts.update(header["counts"])
        for name, values in header["logged"].items():
            logged.setdefault(name, []).extend(values)
    return Rolled([group for group in groups if group is not None], counts, logged)


def _encode(asked: str, rolled: Rolled) -> bytes:
    packed = pack_groups(rolled.groups)
    arrays = packed.pop("arrays")
    header = {"asked": asked, "groups": packed, "counts": dict(rolled.counts), "logged": dict(rolled.logged)}
    text = np.frombuffer(json.dumps(header).encode(), dtype=np.uint8).copy()
    return save(arrays | {"header": torch.from_numpy(text)})


def _decode(message: bytes) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    arrays = load(message)
    return json.loads(arrays.pop("header").numpy().tobytes()), arrays
