"""The settings that the measurements of a selection depend on, as plain values."""

from __future__ import annotations

import hashlib
import inspect
from contextlib import suppress
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any

import numpy as np

from app.module import GRPOModule
from datamodules.online import OnlinePromptDataModule
from datamodules.pool import PromptPool
from datamodules.seeding import run_seed

_SAMPLED = 64
"""Prompts whose tokens are hashed, to notice another template."""


def settings_of(
    module: GRPOModule, datamodule: OnlinePromptDataModule, method: str, options: Any, checkpoint: Path | None
) -> dict[str, Any]:
    """Return the settings by name, as values for JSON; `options` is the method's dataclass."""
    pool, file_hash = datamodule.pools["train"], None
    if checkpoint is not None:
        with checkpoint.open("rb") as file:
            file_hash = hashlib.file_digest(file, "blake2b").hexdigest()[:32]
    settings = {
        "method": method,
        method: asdict(options),
        "pool": pool.fingerprint,
        "prompts": _token_hash(pool),
        "seed": run_seed(),
        "policy": asdict(module.policy),
        "checkpoint": file_hash,
        "sampling": asdict(module.sampling),
    }
    if method == "ufo":  # UFO-RL computes neither rewards nor a loss
        return settings
    learner = module.options
    return settings | {
        "rewards": [{type(reward).__qualname__: _plain(vars(reward))} for reward in module.scorer.rewards],
        "surrogate": asdict(learner.surrogate),
        "advantages": [
            learner.advantage_scale,
            learner.advantage_baseline,
            learner.multi_objective_aggregation,
            learner.aggregation,
            learner.mask_truncated_completions,
        ],
        "optimization": asdict(module.optimization),
        "batches": [datamodule.prompts_per_step, module.mini_batches, module.max_tokens_per_microbatch],
    }


def _plain(values: dict[str, Any]) -> dict[str, Any]:
    """Return the plain settings among an object's attributes, nested objects included."""
    plain: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, str | int | float | bool | None):
            plain[name] = value
        elif is_dataclass(value) and not isinstance(value, type):
            plain[name] = _plain(asdict(value))
        elif not isinstance(value, type) and not inspect.isroutine(value):
            with suppress(TypeError):  # without attributes of its own
                plain[name] = _plain(vars(value))
    return plain


def _token_hash(pool: PromptPool) -> str:
    places = np.unique(np.linspace(0, len(pool) - 1, min(_SAMPLED, len(pool))).astype(np.int64))
    digest = hashlib.blake2b(digest_size=16)
    for place in places:
        digest.update(repr(pool[int(place)].token_ids).encode())
    return digest.hexdigest()
