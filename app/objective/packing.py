"""Micro-batches within a token budget, and the layout of one.

The model reads a padded rectangle, or one row with shared prompts (`shared_prompt`); the loss reads flat tensors.

In a rectangle sequences are padded on the right. Under causal attention no real token then sees a pad, with or without
the mask, and positions need no shift. The hidden state at position `t` predicts the token at `t + 1`, so a completion
of `T` tokens after a prompt of `P` is predicted from positions `P - 1 .. P + T - 2`. Only tokens that the policy
generated are scored: what an environment said between its turns is read, but is not among the predicted tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from app.objective.shared_prompt import SharedPrompts, plan_shared


@dataclass(frozen=True, slots=True, eq=False)
class ScoredSequence:
    """One prompt with one completion, and its inputs to the loss.

    Attributes:
        prompt_ids: int `[P]`, at least one token.
        completion_ids: int `[T]`, at least one token.
        behaviour_logprobs: float: log mu of every generated token.
        weight: the weight of each of its generated tokens in the loss (`ratios.token_weights`).
        old_logprobs: float: log pi_old of every generated token; None if the policy before the update is the behaviour
            policy.
        replayed: the completion was generated at an earlier step.
        group: position of its group in the batch.
        generated: bool `[T]`: the tokens that the policy generated, at least one; None for all.
    """

    prompt_ids: Sequence[int] | np.ndarray
    completion_ids: Sequence[int] | np.ndarray
    behaviour_logprobs: Sequence[float] | np.ndarray
    advantage: float
    weight: float
    old_logprobs: Sequence[float] | np.ndarray | None = None
    replayed: bool = False
    group: int = 0
    generated: np.ndarray | None = None

    def __len__(self) -> int:
        """Tokens of prompt and completion."""
        return len(self.prompt_ids) + len(self.completion_ids)

    @property
    def generated_tokens(self) -> int:
        """Number of tokens that the policy generated: those with a loss."""
        return len(self.completion_ids) if self.generated is None else int(self.generated.sum())


@dataclass(frozen=True, slots=True, eq=False)
class PackedBatch:
    """A micro-batch of `n` sequences of up to `L` tokens, with `T` generated tokens in total.

    Attributes:
        input_ids: int64 `[n, L]`, padded on the right; `[1, N]` with shared prompts.
        attention_mask: int64, 0 on padding; of the same shape.
        position_ids: int64, of the same shape: position of each token in its sequence.
        predictors: int64 `[T]`: positions in the flattened `input_ids` whose hidden states predict `targets`.
        targets: int64 `[T]`: the generated tokens, sequence after sequence.
        sequences: int64 `[T]`: index of the sequence of each token.
        behaviour_logprobs: float32 `[T]`.
        old_logprobs: float32 `[T]`; the behaviour log-probabilities of a sequence without its own.
        advantages: float32 `[T]`.
        weights: float32 `[T]`.
        replayed: bool `[T]`.
        real_tokens: tokens that are read, without padding.
        sequence_tokens: tokens of all prompts and completions, a prompt counted once per completion.
        layout: the attention layout of a single row; None for a rectangle.
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
    sequence_tokens: int
    layout: SharedPrompts | None = None

    @property
    def padding_fraction(self) -> float:
        """Share of the rectangle that is padding."""
        return 1 - self.real_tokens / self.input_ids.numel()

    def predicting(self, hidden: Tensor) -> Tensor:
        """Select the hidden states `[T, H]` that predict `targets` from the model's `[n, L, H]`."""
        return hidden.flatten(0, 1).index_select(0, self.predictors)


def plan_microbatches(lengths: Sequence[int] | np.ndarray, max_tokens: int) -> list[list[int]]:
    """Split sequences into micro-batches of up to `max_tokens`, padding included (rows x longest).

    Sequences of similar length share a micro-batch. The longest come first, so that a budget too large for the memory
    fails at once. A sequence longer than the budget gets its own micro-batch.

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
    """Lay `n >= 1` sequences out as one micro-batch on `device`, a padded rectangle. The padding is never scored.

    Raises:
        ValueError: no sequences, an empty prompt or completion, nothing generated, or not one log-probability per
            generated token.
    """
    prompt, completion = _lengths(sequences)
    length = int((prompt + completion).max())
    ids = np.full((len(sequences), length), pad_token_id, dtype=np.int64)
    for row, sequence in enumerate(sequences):
        ids[row, : prompt[row]] = sequence.prompt_ids
        ids[row, prompt[row] : prompt[row] + completion[row]] = sequence.completion_ids
    first = np.arange(len(sequences)) * length + prompt - 1
    read = int((prompt + completion).sum())
    positions = np.tile(np.arange(length), (len(sequences), 1))
    mask = positions < (prompt + completion)[:, None]
    return _batch(sequences, ids, mask, positions, np.repeat(first, completion) + _within(completion), read, device)


def pack(sequences: Sequence[ScoredSequence], device: torch.device | str = "cpu") -> PackedBatch:
    """Lay sequences out as `collate` does, but in one row without padding in which equal prompts appear once."""
    _, completion = _lengths(sequences)
    owner, chosen = owners(sequences)
    prompts = [np.asarray(sequences[index].prompt_ids, dtype=np.int64) for index in chosen]
    lengths = np.array([len(prompt) for prompt in prompts])
    # The last token of a completion predicts nothing, so the model does not read it.
    written = completion - 1
    ids = np.concatenate([*prompts, *(np.asarray(s.completion_ids, dtype=np.int64)[:-1] for s in sequences)])
    positions = np.concatenate([_within(lengths), np.repeat(lengths[owner], written) + _within(written)])
    # A completion's first token is predicted by the last one of its prompt, the others by the token before.
    starts = lengths.sum() + np.cumsum(written) - written
    predictors = np.repeat(starts - 1, completion) + _within(completion)
    predictors[np.cumsum(completion) - completion] = (np.cumsum(lengths) - 1)[owner]
    layout = SharedPrompts(lengths, written, owner, device)
    mask = np.ones_like(ids)
    return _batch(sequences, ids[None], mask[None], positions[None], predictors, len(ids), device, layout)


def plan_packs(sequences: Sequence[ScoredSequence], max_tokens: int) -> list[list[int]]:
    """Split sequences into micro-batches for `pack` (see `shared_prompt.plan_shared`); return their indices."""
    owner, chosen = owners(sequences)
    prompts = [len(sequences[index].prompt_ids) for index in chosen]
    return plan_shared(owner, prompts, [len(sequence.completion_ids) for sequence in sequences], max_tokens)


def owners(sequences: Sequence[ScoredSequence]) -> tuple[np.ndarray, list[int]]:
    """Return the index of each sequence's prompt among the distinct ones, int64 `[n]`, and a sequence with each."""
    number: dict[bytes, int] = {}
    chosen: list[int] = []
    owner = np.empty(len(sequences), dtype=np.int64)
    for row, sequence in enumerate(sequences):
        key = np.asarray(sequence.prompt_ids, dtype=np.int64).tobytes()
        if key not in number:
            number[key] = len(chosen)
            chosen.append(row)
        owner[row] = number[key]
    return owner, chosen


def _lengths(sequences: Sequence[ScoredSequence]) -> tuple[np.ndarray, np.ndarray]:
    """Check the sequences, and return the tokens of prompts and of completions, `[n]` each."""
    if not sequences:
        raise ValueError("no sequences to collate")
    prompt = np.array([len(sequence.prompt_ids) for sequence in sequences])
    completion = np.array([len(sequence.completion_ids) for sequence in sequences])
    for row, (one, first, second) in enumerate(zip(sequences, prompt, completion, strict=True)):
        if not first or not second:
            raise ValueError(f"sequence {row}: {first} prompt and {second} completion tokens, expected both above 0")
        if one.generated is not None and (len(one.generated) != second or not one.generated_tokens):
            raise ValueError(
                f"sequence {row}: {one.generated_tokens} of {len(one.generated)} tokens are generated, expected at "
                f"least 1 of {second}"
            )
        expected = one.generated_tokens
        for name, values in (("behaviour_logprobs", one.behaviour_logprobs), ("old_logprobs", one.old_logprobs)):
            if values is not None and len(values) != expected:
                raise ValueError(f"sequence {row}: {len(values)} {name}, expected {expected}, one per generated token")
    return prompt, completion


def _within(lengths: np.ndarray) -> np.ndarray:
    """Return `0 .. length - 1` for each length, concatenated."""
    return np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths, lengths)


def _batch(
    sequences: Sequence[ScoredSequence],
    ids: np.ndarray,
    mask: np.ndarray,
    positions: np.ndarray,
    predictors: np.ndarray,
    read: int,
    device: torch.device | str,
    layout: SharedPrompts | None = None,
) -> PackedBatch:
    """Combine a layout with the loss's inputs of every generated token; `predictors` are those of all completions."""
    scored = np.array([sequence.generated_tokens for sequence in sequences])
    generated = np.concatenate(
        [np.ones(len(s.completion_ids), bool) if s.generated is None else s.generated for s in sequences]
    )

    def tensor(array: np.ndarray, dtype: type) -> Tensor:
        return torch.from_numpy(array.astype(dtype, copy=False)).to(device)

    def flat(values: Sequence[Sequence[float] | np.ndarray], dtype: type = np.float32) -> Tensor:
        return tensor(np.concatenate([np.asarray(value, dtype=dtype) for value in values]), dtype)

    def spread(values: Sequence[float], dtype: type = np.float32) -> Tensor:
        return tensor(np.repeat(np.array(values, dtype=dtype), scored), dtype)

    old = [s.behaviour_logprobs if s.old_logprobs is None else s.old_logprobs for s in sequences]
    return PackedBatch(
        input_ids=tensor(ids, np.int64),
        attention_mask=tensor(mask, np.int64),
        position_ids=tensor(positions, np.int64),
        predictors=tensor(predictors[generated], np.int64),
        targets=tensor(np.concatenate([s.completion_ids for s in sequences])[generated], np.int64),
        sequences=spread(range(len(sequences)), np.int64),
        behaviour_logprobs=flat([sequence.behaviour_logprobs for sequence in sequences]),
        old_logprobs=flat(old),
        advantages=spread([sequence.advantage for sequence in sequences]),
        weights=spread([sequence.weight for sequence in sequences]),
        replayed=spread([sequence.replayed for sequence in sequences], np.bool_),
        real_tokens=read,
        sequence_tokens=sum(len(sequence) for sequence in sequences),
        layout=layout,
    )
