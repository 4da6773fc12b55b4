"""Token-budget micro-batches, and the layout of one: a padded rectangle for the model, flat tensors for the loss.

Sequences are padded on the right. Under causal attention no real token then sees a pad, with or without the mask, and
positions need no shift. Only completion tokens are scored: the hidden state at position `t` predicts the token at
`t + 1`, so a completion of `T` tokens after a prompt of `P` is predicted from positions `P - 1 .. P + T - 2`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, eq=False)
class ScoredSequence:
    """One prompt with one completion, and what the loss needs of it.

    Attributes:
        prompt_ids: int `[P]`, at least one token.
        completion_ids: int `[T]`, at least one token.
        behaviour_logprobs: float `[T]`: log mu of every completion token.
        advantage: of the completion.
        weight: of each of its tokens in the loss (`surrogate.token_weights`).
        old_logprobs: float `[T]`: log pi_old where it was computed; None where the policy before the update is the
            behaviour policy.
        replayed: whether it was generated at an earlier step.
    """

    prompt_ids: Sequence[int] | np.ndarray
    completion_ids: Sequence[int] | np.ndarray
    behaviour_logprobs: Sequence[float] | np.ndarray
    advantage: float
    weight: float
    old_logprobs: Sequence[float] | np.ndarray | None = None
    replayed: bool = False

    def __len__(self) -> int:
        """Tokens of prompt and completion."""
        return len(self.prompt_ids) + len(self.completion_ids)


@dataclass(frozen=True, slots=True, eq=False)
class PackedBatch:
    """A micro-batch of `n` sequences, `L` long at most, with `T` completion tokens in all.

    Attributes:
        input_ids: int64 `[n, L]`, padded on the right.
        attention_mask: int64 `[n, L]`, 0 on padding.
        position_ids: int64 `[n, L]`, 0 .. L - 1 in every row.
        predictors: int64 `[T]`: positions in the flattened `[n * L]` whose hidden states predict `targets`.
        targets: int64 `[T]`: the completion tokens, sequence after sequence.
        sequences: int64 `[T]`: row that each token belongs to.
        behaviour_logprobs: float32 `[T]`.
        old_logprobs: float32 `[T]`; the behaviour's where a sequence has none of its own.
        advantages: float32 `[T]`.
        weights: float32 `[T]`.
        replayed: bool `[T]`.
    """

    input_ids: Tensor
    attention_mask: Tensor
    position_ids: Tensor
    predictors: Tensor
    targets: Tensor
    sequences: Tensor
    behaviour_logprobs: Tensor
    old_logprobs: Tensor
    advantages: Tensor
    weights: Tensor
    replayed: Tensor
    real_tokens: int
    """Tokens of prompts and completions, without padding."""

    @property
    def padding_fraction(self) -> float:
        """Share of the rectangle that is padding."""
        return 1 - self.real_tokens / self.input_ids.numel()

    def predicting(self, hidden: Tensor) -> Tensor:
        """Of the model's hidden states `[n, L, H]` those that predict `targets`, `[T, H]`."""
        return hidden.flatten(0, 1).index_select(0, self.predictors)


def plan_microbatches(lengths: Sequence[int] | np.ndarray, max_tokens: int) -> list[list[int]]:
    """Splits sequences into micro-batches whose padded size (rows x longest) is at most `max_tokens`.

    Sequences of similar length share a micro-batch. The longest come first, so that a budget too large for the memory
    fails at once. A sequence longer than the budget gets a micro-batch of its own.

    Args:
        lengths: `N` lengths in tokens, prompt and completion.
        max_tokens: the budget, at least 1.

    Returns:
        Indices into `lengths`; each appears exactly once. Depends on the arguments alone.

    Raises:
        ValueError: `max_tokens` below 1.
    """
    if max_tokens < 1:
        raise ValueError(f"max_tokens={max_tokens}: expected at least 1")
    lengths = np.asarray(lengths, dtype=np.int64)
    plan: list[list[int]] = []
    room = 0
    for index in np.argsort(-lengths, kind="stable").tolist():
        if room == 0:
            plan.append([])
            room = max(max_tokens // max(int(lengths[index]), 1), 1)
        plan[-1].append(index)
        room -= 1
    return plan


def collate(
    sequences: Sequence[ScoredSequence], pad_token_id: int = 0, device: torch.device | str = "cpu"
) -> PackedBatch:
    """Lays sequences out as one micro-batch.

    Args:
        sequences: `n` of them, at least one, in the order of the rows.
        pad_token_id: any valid id; padding is never scored.
        device: where the tensors are to be.

    Raises:
        ValueError: no sequences, an empty prompt or completion, or log-probs that are not one per completion token.
    """
    if not sequences:
        raise ValueError("no sequences to collate")
    for row, sequence in enumerate(sequences):
        _check(row, sequence)
    prompt = np.array([len(sequence.prompt_ids) for sequence in sequences])
    completion = np.array([len(sequence.completion_ids) for sequence in sequences])
    length = int((prompt + completion).max())
    ids = np.full((len(sequences), length), pad_token_id, dtype=np.int64)
    for row, sequence in enumerate(sequences):
        ids[row, : prompt[row]] = sequence.prompt_ids
        ids[row, prompt[row] : prompt[row] + completion[row]] = sequence.completion_ids
    positions = np.arange(length)
    rows = np.repeat(np.arange(len(sequences)), completion)
    within = np.arange(len(rows)) - np.repeat(np.cumsum(completion) - completion, completion)
    predictors = rows * length + np.repeat(prompt, completion) - 1 + within

    def flat(values: Sequence[Sequence[float] | np.ndarray]) -> Tensor:
        return torch.from_numpy(np.concatenate([np.asarray(value, dtype=np.float32) for value in values])).to(device)

    def spread(values: Sequence[float], dtype: type) -> Tensor:
        return torch.from_numpy(np.repeat(np.array(values, dtype=dtype), completion)).to(device)

    behaviour = [sequence.behaviour_logprobs for sequence in sequences]
    old = [s.behaviour_logprobs if s.old_logprobs is None else s.old_logprobs for s in sequences]
    return PackedBatch(
        input_ids=torch.from_numpy(ids).to(device),
        attention_mask=torch.from_numpy((positions < (prompt + completion)[:, None]).astype(np.int64)).to(device),
        position_ids=torch.from_numpy(np.tile(positions, (len(sequences), 1))).to(device),
        predictors=torch.from_numpy(predictors).to(device),
        targets=torch.from_numpy(ids.reshape(-1)[predictors + 1]).to(device),
        sequences=torch.from_numpy(rows).to(device),
        behaviour_logprobs=flat(behaviour),
        old_logprobs=flat(old),
        advantages=spread([sequence.advantage for sequence in sequences], np.float32),
        weights=spread([sequence.weight for sequence in sequences], np.float32),
        replayed=spread([sequence.replayed for sequence in sequences], np.bool_),
        real_tokens=int((prompt + completion).sum()),
    )


def _check(row: int, sequence: ScoredSequence) -> None:
    prompt, completion = len(sequence.prompt_ids), len(sequence.completion_ids)
    if not prompt or not completion:
        raise ValueError(f"sequence {row}: {prompt} prompt and {completion} completion tokens, expected both above 0")
    for name in ("behaviour_logprobs", "old_logprobs"):
        values = getattr(sequence, name)
        if values is not None and len(values) != completion:
            raise ValueError(f"sequence {row}: {len(values)} {name}, expected {completion}, one per completion token")
