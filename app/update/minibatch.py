"""The conversion of a batch's groups into the sequences of its mini-batches."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from app.objective.advantages import Baseline, Scale, decoupled_advantages, group_advantages
from app.objective.packing import ScoredSequence
from app.objective.ratios import Aggregation, token_weights
from app.ranks import deal, imbalance
from datamodules.types import Completion, Prompt, RolloutGroup

_MAX_IMBALANCE = 0.1
"""Share of the mean work that ranks may wait for the busiest one before a prompt's completions are split."""


@dataclass(frozen=True, slots=True)
class CompletionId:
    """A completion by its prompt's id and its position in the group, as in `completions/*.parquet`."""

    prompt_id: str
    sample: int

    def __str__(self) -> str:
        return f"{self.prompt_id}[{self.sample}]"


@dataclass(frozen=True, slots=True, eq=False)
class MiniBatch:
    """The input of one optimizer step.

    Attributes:
        sequences: the sequences that get a forward and a backward pass.
        ids: the ids of the same completions, in the same order.
        tokens: generated tokens of the mini-batch, including those of left-out sequences.
        skipped_tokens: generated tokens left out because their gradient is exactly 0.
    """

    sequences: list[ScoredSequence]
    ids: list[CompletionId]
    tokens: int
    skipped_tokens: int


def advantages_of(
    groups: Sequence[RolloutGroup],
    scale: Scale,
    baseline: Baseline = "mean",
    decoupled: Mapping[str, float] | None = None,
) -> list[np.ndarray]:
    """Return the advantages of each group's completions, float32 `[G]` per group.

    With `decoupled` weights by reward name each reward is normalised on its own (`decoupled_advantages`), else the
    groups' weighted sums are (`group_advantages`).
    """
    if not groups:
        return []
    sizes = [len(group.rewards) for group in groups]
    members = torch.from_numpy(np.repeat(np.arange(len(groups)), sizes))
    lengths = torch.tensor([float(one.generated_tokens) for group in groups for one in group.completions])
    if decoupled is None:
        rewards = _concatenate([group.rewards for group in groups])
        flat = group_advantages(rewards, members, scale, baseline, lengths)
    else:
        columns = [_concatenate([group.components[name] for group in groups]) for name in decoupled]
        weights = torch.tensor(list(decoupled.values()))
        flat = decoupled_advantages(torch.stack(columns, dim=1), weights, members, scale, baseline, lengths)
    return np.split(flat.numpy(), np.cumsum(sizes)[:-1])


def _concatenate(parts: Sequence[np.ndarray]) -> torch.Tensor:
    return torch.from_numpy(np.concatenate(parts).astype(np.float32))


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
    """Split whole groups into mini-batches, shuffled if there are several, and weight their tokens.

    Each mini-batch gets as many groups with an advantage as any other, give or take one: dealt by chance, some steps
    would rest on few groups, and an optimizer that normalises gradients goes as far on those. Groups of unlike sizes
    weigh alike (see `objective.ratios.token_weights`).

    Args:
        groups: the groups of one batch.
        advantages: float32 `[G]` per group.
        parts: number of mini-batches.
        generator: source of the shuffle.
        aggregation: see `objective.ratios.token_weights`.
        max_completion_length: completion limit in tokens.
        keep_zero_advantage: the loss has a KL or entropy term, so that completions with advantage 0 have a gradient.
            Otherwise they are left out, and count in the denominators only.
        mask_truncated: leave completions that were cut at the length limit out of loss and denominators (overlong
            filtering, DAPO, arXiv 2503.14476, section 3.4); their rewards still count in their groups' baselines.
        step: groups born before it count as replayed, from any source: another policy generated them.
    """
    order = np.arange(len(groups))
    if parts > 1:
        silent = np.array([not one.any() for one in advantages], dtype=bool)
        order = generator.permutation(len(groups))
        order = order[np.argsort(silent[order], kind="stable")]
    sizes = np.array([len(group.completions) for group in groups])
    mean_size = sizes.sum() / max(1, (sizes > 0).sum())
    found = []
    for chosen in (order[part::parts] for part in range(parts)):
        rows = [
            (int(index), sample, completion, float(advantage))
            for index in chosen
            for sample, (completion, advantage) in enumerate(
                zip(groups[index].completions, advantages[index], strict=True)
            )
            if completion.generated_tokens and not (mask_truncated and completion.finish_reason == "length")
        ]
        lengths = torch.tensor([completion.generated_tokens for _, _, completion, _ in rows], dtype=torch.int64)
        shares = torch.tensor([mean_size / sizes[index] for index, *_ in rows])
        weights = token_weights(
            lengths, aggregation, max_completion_length=max_completion_length, shares=shares
        ).tolist()
        part = MiniBatch([], [], int(lengths.sum()), int(lengths.sum()))
        for (index, sample, completion, advantage), weight in zip(rows, weights, strict=True):
            if advantage == 0 and not keep_zero_advantage:
                continue
            group = groups[index]
            replayed = group.source == "replay" or (step is not None and group.birth_step < step)
            part.sequences.append(sequence_of(group.prompt, completion, advantage, weight, replayed, index))
            part.ids.append(CompletionId(group.prompt.id, sample))
        trained = sum(sequence.generated_tokens for sequence in part.sequences)
        found.append(dataclasses.replace(part, skipped_tokens=part.tokens - trained))
    return found


def sequence_of(
    prompt: Prompt, completion: Completion, advantage: float, weight: float, replayed: bool = False, group: int = 0
) -> ScoredSequence:
    """Return a completion with at least one generated token as the loss reads it; see `ScoredSequence`.

    What an environment said after the policy's last token predicts nothing and is left out.
    """
    context = prompt.token_ids if completion.context is None else completion.context
    ids, logprobs, generated = completion.token_ids, completion.logprobs, None
    if completion.turns:
        marks = completion.generated
        end = int(np.flatnonzero(marks)[-1]) + 1
        ids, logprobs, generated = ids[:end], logprobs[marks], marks[:end]
    return ScoredSequence(context, ids, logprobs, advantage, weight, None, replayed, group, generated)


def shares(part: MiniBatch, ranks: int) -> list[MiniBatch]:
    """Split a mini-batch into one share per rank, balanced by tokens; totals and weights stay the whole's.

    A prompt's completions stay together, so that it is read once, unless ranks would then wait more than
    `_MAX_IMBALANCE`.
    """
    sizes = [len(sequence) for sequence in part.sequences]
    prompts: dict[str, list[int]] = {}
    for row, name in enumerate(part.ids):
        prompts.setdefault(name.prompt_id, []).append(row)
    together = list(prompts.values())
    pieces = deal([sum(sizes[row] for row in rows) for rows in together], ranks)
    dealt = [sorted(row for piece in share for row in together[piece]) for share in pieces]
    if imbalance(sizes, dealt) > _MAX_IMBALANCE:
        dealt = deal(sizes, ranks)
    return [
        dataclasses.replace(part, sequences=[part.sequences[row] for row in rows], ids=[part.ids[row] for row in rows])
        for rows in dealt
    ]


def token_imbalance(dealt: Sequence[MiniBatch]) -> float:
    """Return the excess of the busiest rank's tokens over the mean, given the ranks' shares of a mini-batch."""
    loads = [sum(map(len, share.sequences)) for share in dealt]
    return imbalance(loads, [[rank] for rank in range(len(loads))])
