"""From the groups of a batch to the sequences of its mini-batches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from app.objective.advantages import Scale, group_advantages
from app.objective.packing import ScoredSequence
from app.objective.surrogate import Aggregation, token_weights
from datamodules.types import RolloutGroup


@dataclass(frozen=True, slots=True, eq=False)
class MiniBatch:
    """What one optimizer step works on.

    Attributes:
        sequences: those that get a forward and a backward pass.
        tokens: completion tokens of the mini-batch, those of left-out sequences included.
        skipped_tokens: completion tokens whose gradient is exactly 0, left out.
    """

    sequences: list[ScoredSequence]
    tokens: int
    skipped_tokens: int


def advantages_of(groups: Sequence[RolloutGroup], scale: Scale) -> list[np.ndarray]:
    """float32 `[G]` per group."""
    if not groups:
        return []
    sizes = [len(group.rewards) for group in groups]
    rewards = torch.from_numpy(np.concatenate([group.rewards for group in groups]).astype(np.float32))
    members = torch.from_numpy(np.repeat(np.arange(len(groups)), sizes))
    flat = group_advantages(rewards, members, scale).numpy()
    return np.split(flat, np.cumsum(sizes)[:-1])


def minibatches(
    groups: Sequence[RolloutGroup],
    advantages: Sequence[np.ndarray],
    *,
    parts: int,
    generator: np.random.Generator,
    aggregation: Aggregation,
    max_completion_length: int,
    keep_zero_advantage: bool,
) -> list[MiniBatch]:
    """Deals whole groups into `parts` mini-batches (shuffled when there are several) and weighs their tokens.

    A completion with advantage 0 contributes nothing to the gradient unless the loss has a KL or entropy term
    (`keep_zero_advantage`): it is left out, and stays in the denominators.
    """
    order = generator.permutation(len(groups)) if parts > 1 else np.arange(len(groups))
    return [
        _minibatch(
            [groups[index] for index in chosen],
            [advantages[index] for index in chosen],
            aggregation,
            max_completion_length,
            keep_zero_advantage,
        )
        for chosen in np.array_split(order, parts)
    ]


def _minibatch(
    groups: Sequence[RolloutGroup],
    advantages: Sequence[np.ndarray],
    aggregation: Aggregation,
    max_completion_length: int,
    keep_zero_advantage: bool,
) -> MiniBatch:
    rows = [
        (group, completion, float(advantage))
        for group, values in zip(groups, advantages, strict=True)
        for completion, advantage in zip(group.completions, values, strict=True)
        if len(completion.token_ids)
    ]
    if not rows:
        return MiniBatch([], 0, 0)
    lengths = torch.tensor([len(completion.token_ids) for _, completion, _ in rows])
    weights = token_weights(lengths, aggregation, max_completion_length=max_completion_length).tolist()
    sequences = [
        ScoredSequence(
            prompt_ids=group.prompt.token_ids,
            completion_ids=completion.token_ids,
            behaviour_logprobs=completion.logprobs,
            advantage=advantage,
            weight=weight,
            replayed=group.source == "replay",
        )
        for (group, completion, advantage), weight in zip(rows, weights, strict=True)
        if advantage != 0 or keep_zero_advantage
    ]
    kept = sum(len(sequence.completion_ids) for sequence in sequences)
    return MiniBatch(sequences, int(lengths.sum()), int(lengths.sum()) - kept)
