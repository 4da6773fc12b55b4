"""From the groups of a batch to the sequences of its mini-batches."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from app.objective.advantages import Baseline, Scale, decoupled_advantages, group_advantages
from app.objective.packing import ScoredSequence
from app.objective.weights import Aggregation, token_weights
from app.ranks import deal, imbalance
from datamodules.types import Completion, RolloutGroup

_PATIENCE = 0.1
"""Share of the mean work that ranks may wait for the one with most."""


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


def shares(part: MiniBatch, ranks: int) -> list[MiniBatch]:
    """A mini-batch dealt to ranks so that their tokens balance; its tokens and weights stay those of the whole.

    The completions of a prompt stay together, so that it is read once, unless a rank would then wait more than
    `_PATIENCE` for another.
    """
    sizes = [len(sequence) for sequence in part.sequences]
    prompts: dict[str, list[int]] = {}
    for row, name in enumerate(part.ids):
        prompts.setdefault(name.prompt_id, []).append(row)
    together = list(prompts.values())
    pieces = deal([sum(sizes[row] for row in rows) for rows in together], ranks)
    dealt = [sorted(row for piece in share for row in together[piece]) for share in pieces]
    if imbalance(sizes, dealt) > _PATIENCE:
        dealt = deal(sizes, ranks)
    return [
        dataclasses.replace(part, sequences=[part.sequences[row] for row in rows], ids=[part.ids[row] for row in rows])
        for rows in dealt
    ]


def token_imbalance(dealt: Sequence[Sequence[MiniBatch]]) -> float:
    """By what share of the mean the rank with most tokens exceeds it, in the worst of a batch's dealt mini-batches."""
    loads = [[sum(map(len, share.sequences)) for share in part] for part in dealt]
    return max(imbalance(load, [[rank] for rank in range(len(load))]) for load in loads)


def _joined(parts: Sequence[np.ndarray]) -> torch.Tensor:
    """float32 `[N]`, group after group."""
    return torch.from_numpy(np.concatenate(parts).astype(np.float32))
