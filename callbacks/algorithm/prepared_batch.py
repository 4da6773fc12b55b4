"""The state of a batch whose prompts were chosen, and partly rolled out, during the step before."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from datamodules.group_codec import pack_groups, unpack_groups
from datamodules.ledger import WeightedMean
from datamodules.online import OnlinePromptDataModule
from datamodules.pool import PromptPool
from datamodules.types import RolloutGroup, TrainBatch


def prepared_state(data: OnlinePromptDataModule) -> dict[str, Any]:
    """Return the state of the batch that is prepared for the next step; empty without one."""
    coming = data.prepared
    if coming is None:
        return {}
    dropped = coming.of("dropped")
    return {
        "step": coming.step,
        "prompts_per_step": data.prompts_per_step,
        "prompts": [prompt.id for prompt in coming.prompts],
        **packed(coming.groups),
        **({"dropped": packed(dropped)} if dropped else {}),
        "forecast": None if coming.forecast is None else torch.from_numpy(coming.forecast.copy()),
        "pool_forecast": None if coming.pool_forecast is None else torch.from_numpy(coming.pool_forecast.copy()),
        "explored": sorted(coming.explored),
        "seconds": dict(coming.ledger.seconds),
        "counts": dict(coming.ledger.counts),
        "reward_metrics": {name: list(mean) for name, mean in coming.ledger.reward_metrics.items()},
    }


def restored_batch(state: Mapping[str, Any], data: OnlinePromptDataModule) -> TrainBatch:
    """Restore the batch from `prepared_state`, with as many prompts as the run now has per step.

    Additional prompts have no group; groups of prompts that are left out are surplus.
    """
    pool = data.pools["train"]
    prompts = [pool[position] for position in pool.positions(state["prompts"])]
    forecast, pool_forecast = (
        None if state[name] is None else state[name].numpy() for name in ("forecast", "pool_forecast")
    )
    coming = TrainBatch(state["step"], prompts, forecast)
    coming.pool_forecast = pool_forecast
    coming.add(unpacked(state, pool))
    if "dropped" in state:
        coming.add(unpacked(state["dropped"], pool), "dropped")
    coming.explored = frozenset(state["explored"])
    coming.ledger.seconds.update(state["seconds"])
    coming.ledger.counts.update(state["counts"])
    for name, mean in state.get("reward_metrics", {}).items():
        coming.ledger.average(name, WeightedMean(*mean))
    now = data.prompts_per_step
    more = now - state.get("prompts_per_step", now)  # the resumed run may have been given another number
    if more > 0:
        data.add_prompts(coming, more)  # rolled out when the step begins
    elif more < 0:
        kept = max(0, len(coming.prompts) + more)
        left_out = {prompt.id for prompt in coming.prompts[kept:]}
        coming.prompts, coming.forecast = coming.prompts[:kept], None if forecast is None else forecast[:kept]
        coming.move([group for group, _ in coming.rollouts if group.prompt.id in left_out], "surplus")
    return coming


def packed(groups: Sequence[RolloutGroup]) -> dict[str, Any]:
    """Return groups for a checkpoint."""
    return {"groups": pack_groups(groups), "extras": json.dumps([dict(group.extras) for group in groups])}


def unpacked(state: Mapping[str, Any], pool: PromptPool) -> list[RolloutGroup]:
    """Restore the groups from `packed`."""
    groups = unpack_groups(state["groups"], pool)
    extras = json.loads(state["extras"]) if "extras" in state else [{} for _ in groups]
    return [replace(group, extras=one) for group, one in zip(groups, extras, strict=True)]
