"""From the groups of a batch to the sequences of its mini-batches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from app.objective.advantages import Baseline, Scale, decoupled_advantages, group_advantages
from app.objective.packing import ScoredSequence
from app.objective.weights import Aggregation, token_weights
from datamodules.types import Completion, RolloutGroup


@dataclass(frozen=True, slots=True)
class CompletionId:
    """Which completion: the prompt's id and the position in its group, as in `completions/*.parquet`."""

    prompt_id: str
    sample: int

    def __str__(self) -> str:
        return f"{self.prompt_id}[{self.sample}]"


@dataclass(frozen=True, slots=True, eq=False)
class MiniBatch:
    """What one optimizer step works on.

    Attributes:
        sequences: those that get a forward and a backward pass.
        ids: of the same completions, in the same order.
        tokens: completion tokens of the mini-batch, those of left-out sequences included.
        skipped_tokens: completion tokens whose gradient is exactly 0, left out.
    """

    sequences: list[ScoredSequence]
    ids: list[CompletionId]
    tokens: int
    skipped_tokens: int


def advantages_of(
    groups: Sequence[RolloutGroup],
    scale: Scale,
    baseline: Baseline = "mean",
    apart: Mapping[str, float] | None = None,
) -> list[np.ndarray]:
    """float32 `[G]` per group.

    Args:
        groups: of one batch.
        scale: `objective.advantages.group_advantages`.
        baseline: likewise.
        apart: weights by reward name, to normalise each reward by itself (`decoupled_advantages`); None takes the
            groups' weighted sums.
    """
    if not groups:
        return []
    sizes = [len(group.rewards) for group in groups]
    members = torch.from_numpy(np.repeat(np.arange(len(groups)), sizes))
    if apart is None:
        flat = group_advantages(_joined([group.rewards for group in groups]), members, scale, baseline)
    else:
        components = torch.stack([_joined([group.components[name] for group in groups]) for name in apart], dim=1)
        flat = decoupled_advantages(components, torch.tensor(list(apart.values())), members, scale, baseline)
    return np.split(flat.numpy(), np.cumsum(sizes)[:-1])


def minibatches(
    groups: Sequence[RolloutGroup],
    advantages: Sequence[np.ndarray],
    *,
    parts: int,
    generator: np.random.Generator,
    aggregation: Aggregation,
    max_completion_length: int,
    keep_zero_advantage: bool,
    mask_truncated: bool = False,
    step: int | None = None,
) -> list[MiniBatch]:
    """Deals whole groups into `parts` mini-batches (shuffled when there are several) and weighs their tokens.

    A completion with advantage 0 contributes nothing to the gradient unless the loss has a KL or entropy term
    (`keep_zero_advantage`): it is left out, and stays in the denominators. With `mask_truncated` a completion that was
    cut at the length limit counts nothing: neither in the loss nor in a denominator (overlong filtering, DAPO, arXiv
    2503.14476, section 3.4); its reward still counts in its group's baseline. A group born before `step` counts as
    replayed, whatever its source: another policy than that of `step` has made it.
    """
    order = generator.permutation(len(groups)) if parts > 1 else np.arange(len(groups))
    return [
        _minibatch(
            _rows([groups[index] for index in chosen], [advantages[index] for index in chosen], mask_truncated),
            aggregation,
            max_completion_length,
            keep_zero_advantage,
            step,
        )
        for chosen in np.array_split(order, parts)
    ]


_Row = tuple[RolloutGroup, Completion, CompletionId, float]


def _rows(groups: Sequence[RolloutGroup], advantages: Sequence[np.ndarray], mask_truncated: bool) -> list[_Row]:
    """Every completion that counts, with its advantage."""
    return [
        (group, completion, CompletionId(group.prompt.id, sample), float(advantage))
        for group, values in zip(groups, advantages, strict=True)
        for sample, (completion, advantage) in enumerate(zip(group.completions, values, strict=True))
        if len(completion.token_ids) and not (mask_truncated and completion.finish_reason == "length")
    ]


def _minibatch(
    rows: Sequence[_Row],
    aggregation: Aggregation,
    max_completion_length: int,
    keep_zero_advantage: bool,
    step: int | None,
) -> MiniBatch:
    if not rows:
        return MiniBatch([], [], 0, 0)
    lengths = torch.tensor([len(completion.token_ids) for _, completion, _, _ in rows])
    weights = token_weights(lengths, aggregation, max_completion_length=max_completion_length).tolist()
    kept = [(row, weight) for row, weight in zip(rows, weights, strict=True) if row[3] != 0 or keep_zero_advantage]
    sequences = [
        ScoredSequence(
            prompt_ids=group.prompt.token_ids,
            completion_ids=completion.token_ids,
            behaviour_logprobs=completion.logprobs,
            advantage=advantage,
            weight=weight,
            replayed=group.source == "replay" or (step is not None and group.birth_step < step),
        )
        for (group, completion, _, advantage), weight in kept
    ]
    trained = sum(len(sequence.completion_ids) for sequence in sequences)
    return MiniBatch(sequences, [row[2] for row, _ in kept], int(lengths.sum()), int(lengths.sum()) - trained)


def _joined(parts: Sequence[np.ndarray]) -> torch.Tensor:
    """float32 `[N]`, group after group."""
    return torch.from_numpy(np.concatenate(parts).astype(np.float32))
