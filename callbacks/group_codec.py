"""Rollout groups as a few flat tensors and lists: what a checkpoint holds of them, loadable with `weights_only`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch

from datamodules.pool import PromptPool
from datamodules.types import Completion, RolloutGroup

_FINISH = ("stop", "length")


def pack_groups(groups: Sequence[RolloutGroup]) -> dict[str, Any]:
    """Everything of the groups but their prompts, which are named by id."""
    completions = [completion for group in groups for completion in group.completions]
    names = sorted(groups[0].components) if groups else []
    return {
        "prompt_ids": [group.prompt.id for group in groups],
        "sources": [group.source for group in groups],
        "birth_steps": [group.birth_step for group in groups],
        "sizes": [len(group.completions) for group in groups],
        "lengths": [len(completion.token_ids) for completion in completions],
        "finish": [_FINISH.index(completion.finish_reason) for completion in completions],
        "versions": [completion.policy_version for completion in completions],
        "texts": [completion.text for completion in completions],
        "token_ids": _flat([completion.token_ids for completion in completions], np.int32),
        "logprobs": _flat([completion.logprobs for completion in completions], np.float32),
        "rewards": _flat([group.rewards for group in groups], np.float32),
        "correctness": _flat([group.correctness for group in groups], np.float32),
        "components": {name: _flat([group.components[name] for group in groups], np.float32) for name in names},
    }


def unpack_groups(packed: dict[str, Any], pool: PromptPool) -> list[RolloutGroup]:
    """The groups of `pack_groups`, their prompts taken from the pool by id (KeyError for an unknown one)."""
    completions = _unpack_completions(packed)
    rewards = _slices(packed["rewards"], packed["sizes"])
    correctness = _slices(packed["correctness"], packed["sizes"])
    components = {name: _slices(flat, packed["sizes"]) for name, flat in packed["components"].items()}
    positions = pool.positions(packed["prompt_ids"])
    groups = []
    for index, size in enumerate(packed["sizes"]):
        groups.append(
            RolloutGroup(
                prompt=pool[positions[index]],
                completions=tuple(next(completions) for _ in range(size)),
                rewards=rewards[index],
                correctness=correctness[index],
                components={name: parts[index] for name, parts in components.items()},
                source=packed["sources"][index],
                birth_step=packed["birth_steps"][index],
            )
        )
    return groups


def _unpack_completions(packed: dict[str, Any]) -> Iterator[Completion]:
    token_ids = _slices(packed["token_ids"], packed["lengths"])
    logprobs = _slices(packed["logprobs"], packed["lengths"])
    rows = zip(token_ids, logprobs, packed["finish"], packed["versions"], packed["texts"], strict=True)
    for ids, behaviour, finish, version, text in rows:
        yield Completion(ids, behaviour, _FINISH[finish], version, text)  # type: ignore[arg-type]


def _flat(parts: Sequence[np.ndarray], dtype: Any) -> torch.Tensor:
    joined = np.concatenate([np.asarray(part, dtype=dtype) for part in parts]) if parts else np.empty(0, dtype)
    return torch.from_numpy(joined)


def _slices(flat: torch.Tensor, sizes: Sequence[int]) -> list[np.ndarray]:
    return np.split(flat.numpy(), np.cumsum(sizes)[:-1]) if sizes else []
