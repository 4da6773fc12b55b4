"""Rollout groups as flat arrays, for the replay buffer and for checkpoints.

Everything but the prompt is copied into arrays of its own, so that their sizes add up to the memory in use, and no
entry keeps an engine's padded matrices alive. A checkpoint joins them into one tensor per field, which `torch.load`
reads with `weights_only`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from functools import partial
from typing import Any, Literal, TypeAlias

import numpy as np
import torch

from datamodules.pool import PromptPool
from datamodules.types import Completion, FinishReason, Prompt, RolloutGroup, Source, Turn

LogprobDtype = Literal["float32", "float16"]
GroupState: TypeAlias = dict[str, Any]
"""Tensors and plain values, as a checkpoint holds them."""
_FINISH: tuple[FinishReason, ...] = ("stop", "length")
_no_bytes, _no_numbers = partial(np.empty, 0, np.uint8), partial(np.empty, 0, np.int32)


@dataclass(frozen=True, slots=True, eq=False)
class PackedGroup:
    """A rollout group of `G` completions with `T` tokens in all, `R` reward functions and `S` bytes of text.

    Attributes:
        prompt: shared with the pool, so it takes no memory here.
        component_names: names of the `R` reward functions.
        token_ids: int32 `[T]`, the completions concatenated.
        logprobs: float32 or float16 `[T]`: log mu; NaN for what an environment said.
        lengths: int32 `[G]`: number of tokens of each completion.
        finish: uint8 `[G]`: position of the finish reason in ("stop", "length").
        versions: int64 `[G]`: policy versions.
        text: uint8 `[S]`: the completions' texts in UTF-8, concatenated.
        text_lengths: int32 `[G]`: number of bytes of each text.
        rewards: float32 `[G]`.
        correctness: float32 `[G]`.
        components: float32 `[R, G]`.
        turns: uint8: the turns of each completion as JSON, concatenated.
        turn_lengths: int32 `[G]`: number of bytes of each completion's turns; empty if none has turns.
        context: int32: the contexts of the completions, concatenated.
        context_lengths: int32 `[G]`: number of tokens of each context, 0 for None; empty if all are.
    """

    prompt: Prompt
    source: Source
    birth_step: int
    component_names: tuple[str, ...]
    token_ids: np.ndarray
    logprobs: np.ndarray
    lengths: np.ndarray
    finish: np.ndarray
    versions: np.ndarray
    text: np.ndarray
    text_lengths: np.ndarray
    rewards: np.ndarray
    correctness: np.ndarray
    components: np.ndarray
    turns: np.ndarray = field(default_factory=_no_bytes)
    turn_lengths: np.ndarray = field(default_factory=_no_numbers)
    context: np.ndarray = field(default_factory=_no_numbers)
    context_lengths: np.ndarray = field(default_factory=_no_numbers)

    @property
    def arrays(self) -> dict[str, np.ndarray]:
        """All arrays by field name."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in values.items() if isinstance(value, np.ndarray)}

    @property
    def nbytes(self) -> int:
        """Bytes of all its arrays."""
        return sum(array.nbytes for array in self.arrays.values())


def pack(group: RolloutGroup, logprob_dtype: LogprobDtype = "float32") -> PackedGroup:
    """Copy a group into compact arrays, without extras and without the outcomes of conversations.

    float16 changes a stored log-probability by at most `2**-11 |log mu|` (half a unit in the last of 11 bits), or
    2**-25 near 0, and a token's importance ratio `pi / mu` by at most the exponential of that: 0.05% for a token of
    probability 1/e, 0.4% at e^-8. Over a completion the errors of the logarithms add up, mostly cancelling.
    """
    completions = group.completions
    texts = [completion.text.encode("utf-8", "surrogatepass") for completion in completions]
    turns = [json.dumps([asdict(turn) for turn in one.turns]).encode() if one.turns else b"" for one in completions]
    contexts = [_no_numbers() if one.context is None else one.context for one in completions]
    names = tuple(sorted(group.components))
    components = [np.asarray(group.components[name], dtype=np.float32) for name in names]
    return PackedGroup(
        prompt=group.prompt,
        source=group.source,
        birth_step=group.birth_step,
        component_names=names,
        token_ids=_joined([completion.token_ids for completion in completions], np.int32),
        logprobs=_logprobs(_joined([completion.logprobs for completion in completions], np.float32), logprob_dtype),
        lengths=np.array([len(completion.token_ids) for completion in completions], dtype=np.int32),
        finish=np.array([_FINISH.index(completion.finish_reason) for completion in completions], dtype=np.uint8),
        versions=np.array([completion.policy_version for completion in completions], dtype=np.int64),
        text=np.frombuffer(b"".join(texts), dtype=np.uint8).copy(),
        text_lengths=np.array([len(text) for text in texts], dtype=np.int32),
        rewards=np.array(group.rewards, dtype=np.float32),
        correctness=np.array(group.correctness, dtype=np.float32),
        components=np.array(components, dtype=np.float32).reshape(len(names), len(completions)),
        turns=np.frombuffer(b"".join(turns), dtype=np.uint8).copy(),
        turn_lengths=_lengths(turns),
        context=_joined(contexts, np.int32),
        context_lengths=_lengths(contexts),
    )


def unpack(packed: PackedGroup) -> RolloutGroup:
    """Restore the group from `pack`. Arrays are views where the dtype is the same; log-probabilities are float32."""
    parts = zip(
        _slices(packed.token_ids, packed.lengths),
        _slices(packed.logprobs.astype(np.float32, copy=False), packed.lengths),
        packed.finish.tolist(),
        packed.versions.tolist(),
        _slices(packed.text, packed.text_lengths),
        *(
            _slices(flat, sizes) if len(sizes) else [flat] * len(packed.lengths)
            for flat, sizes in ((packed.turns, packed.turn_lengths), (packed.context, packed.context_lengths))
        ),
        strict=True,
    )
    return RolloutGroup(
        prompt=packed.prompt,
        completions=tuple(
            Completion(
                token_ids=ids,
                logprobs=logprobs,
                finish_reason=_FINISH[finish],
                policy_version=version,
                text=text.tobytes().decode("utf-8", "surrogatepass"),
                turns=tuple(Turn(**turn) for turn in json.loads(turns.tobytes())) if turns.size else (),
                context=context if context.size else None,
            )
            for ids, logprobs, finish, version, text, turns, context in parts
        ),
        rewards=packed.rewards,
        correctness=packed.correctness,
        components=dict(zip(packed.component_names, packed.components, strict=True)),
        source=packed.source,
        birth_step=packed.birth_step,
    )


def join(entries: Sequence[PackedGroup]) -> GroupState:
    """Concatenate entries for a checkpoint. Prompts are stored by id only."""
    arrays = [entry.arrays for entry in entries]
    flat = {name: [entry[name].reshape(-1) for entry in arrays] for name in arrays[0]} if arrays else {}
    return {
        "prompt_ids": [entry.prompt.id for entry in entries],
        "sources": [entry.source for entry in entries],
        "birth_steps": [entry.birth_step for entry in entries],
        "component_names": [list(entry.component_names) for entry in entries],
        "sizes": {name: [part.size for part in parts] for name, parts in flat.items()},
        "arrays": {name: torch.from_numpy(np.concatenate(parts)) for name, parts in flat.items()},
    }


def split(state: GroupState, pool: PromptPool, logprob_dtype: LogprobDtype = "float32") -> list[PackedGroup]:
    """Restore the entries from `join`, with prompts from the pool (KeyError for an unknown id)."""
    # Copies: a view would keep the whole joined array alive as long as any of its entries.
    columns = {
        name: [part.copy() for part in _slices(flat.numpy(), state["sizes"][name])]
        for name, flat in state["arrays"].items()
    }
    entries = []
    for index, position in enumerate(pool.positions(state["prompt_ids"])):
        names = tuple(state["component_names"][index])
        arrays = {name: column[index] for name, column in columns.items()}
        arrays["logprobs"] = _logprobs(arrays["logprobs"], logprob_dtype)
        arrays["components"] = arrays["components"].reshape(len(names), len(arrays["rewards"]))
        source, birth_step = state["sources"][index], state["birth_steps"][index]
        entries.append(PackedGroup(pool[position], source, birth_step, names, **arrays))
    return entries


def pack_groups(groups: Sequence[RolloutGroup]) -> GroupState:
    """Pack groups for a checkpoint, without loss."""
    return join([pack(group) for group in groups])


def unpack_groups(state: GroupState, pool: PromptPool) -> list[RolloutGroup]:
    """Restore the groups from `pack_groups`, with prompts from the pool (KeyError for an unknown id)."""
    return [unpack(entry) for entry in split(state, pool)]


def _joined(parts: Sequence[np.ndarray], dtype: type) -> np.ndarray:
    return np.concatenate([np.asarray(part, dtype=dtype) for part in parts]) if parts else np.empty(0, dtype)


def _lengths(parts: Sequence[bytes | np.ndarray]) -> np.ndarray:
    """Return the lengths of parts, int32 `[G]`; nothing if all are empty."""
    return np.array([len(part) for part in parts] if any(map(len, parts)) else [], dtype=np.int32)


def _logprobs(values: np.ndarray, dtype: LogprobDtype) -> np.ndarray:
    if dtype == "float16":
        # A value below float16's range would become -inf.
        values = np.maximum(values, np.finfo(np.float16).min)
    return values.astype(dtype, copy=False)


def _slices(flat: np.ndarray, sizes: Sequence[int] | np.ndarray) -> list[np.ndarray]:
    return np.split(flat, np.cumsum(sizes)[:-1]) if len(sizes) else []
