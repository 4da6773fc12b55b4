"""The layout of a micro-batch in which a prompt appears once for all its completions, without padding.

All tokens are in one row: the prompts, then the completions without their last token, which predicts nothing. Only the
attention layers of a transformer mix tokens, so only attention needs to know the layout: a prompt attends to itself, a
completion to its prompt and to itself. Both are causal, so the hidden states equal those of each sequence alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from app.objective.varlen_attention import Runs, has_kernel, shared_attention

UNSUPPORTED = ("softcap", "sliding_window", "s_aux", "position_bias")
"""Arguments that transformers passes to attention for some models, and that an attention with its own layout lacks."""


@dataclass(frozen=True, slots=True, eq=False)
class Blocks:
    """Runs of consecutive tokens, and the rectangle `[n, L]` that they are padded to inside attention.

    Attributes:
        shape: `n` and `L`.
        tokens: int64 `[n * L]`: the token at each place of the rectangle, 0 on padding.
        places: int64 `[N]`: the place of each token.
    """

    shape: tuple[int, int]
    tokens: Tensor
    places: Tensor

    @classmethod
    def of(cls, lengths: np.ndarray, device: torch.device | str = "cpu") -> Blocks:
        """Return the blocks of `n` consecutive runs with int `[n]` lengths."""
        longest = int(lengths.max(initial=0))
        within = np.arange(longest)
        starts = np.cumsum(lengths) - lengths
        real = within < lengths[:, None]
        tokens = np.where(real, starts[:, None] + within, 0).reshape(-1)
        places = np.flatnonzero(real)
        on_device = (torch.from_numpy(array).to(device) for array in (tokens, places))
        return cls((len(lengths), longest), *on_device)

    def pad(self, values: Tensor) -> Tensor:
        """Pad `[N, heads, width]` to `[n, heads, L, width]`; padding is arbitrary and gets no gradient."""
        return _Pad.apply(values, self.tokens, self.places).unflatten(0, self.shape).transpose(1, 2)

    def join(self, padded: Tensor) -> Tensor:
        """Remove the padding: `[n, heads, L, width]` to `[N, heads, width]`."""
        return _Gather.apply(padded.transpose(1, 2).flatten(0, 1), self.places, True)


@dataclass(frozen=True, eq=False)
class SharedPrompts:
    """The attention layout of `N` tokens in one row: prompt after prompt, then completion after completion.

    What one of the two kinds of attention needs is made when it is first asked for.

    Attributes:
        prompt_lengths: int64 `[g]`.
        completion_lengths: int64 `[n]`: tokens of each completion in the row.
        owner: int64 `[n]`: the prompt of each completion.
        device: of the tokens.
    """

    prompt_lengths: np.ndarray
    completion_lengths: np.ndarray
    owner: np.ndarray
    device: torch.device | str = "cpu"

    @cached_property
    def prompts(self) -> Blocks:
        return Blocks.of(self.prompt_lengths, self.device)

    @cached_property
    def completions(self) -> Blocks:
        return Blocks.of(self.completion_lengths, self.device)

    @cached_property
    def owners(self) -> Tensor:
        return torch.from_numpy(self.owner).to(self.device)

    @cached_property
    def mask(self) -> Tensor:
        """Bool `[n, 1, T, P + T]`: the tokens of its prompt and of its completion that each token attends to."""
        (n, longest), read = self.completions.shape, self.prompts.shape[1]
        own = torch.ones(longest, longest, dtype=torch.bool, device=self.device).tril()
        lengths = torch.from_numpy(self.prompt_lengths[self.owner]).to(self.device)
        shared = torch.arange(read, device=self.device) < lengths[:, None]
        both = [shared[:, None].expand(n, longest, read), own.expand(n, longest, longest)]
        return torch.cat(both, dim=2).unsqueeze(1)

    @cached_property
    def runs(self) -> tuple[Runs, Runs] | None:
        """The runs of all tokens, and those of the completions after each prompt.

        None where these are not consecutive, or there are none: that is left to the attention with a mask.
        """
        if (np.diff(self.owner) < 0).any() or not self.completion_lengths.any():
            return None
        written = np.bincount(self.owner, self.completion_lengths, len(self.prompt_lengths)).astype(np.int64)
        lengths = np.concatenate([self.prompt_lengths, self.completion_lengths])
        own = Runs.of(lengths, lengths, True, self.device)
        return own, Runs.of(written, self.prompt_lengths, False, self.device)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, *, scale: float | None, dropout: float) -> Tensor:
        """Return the attention output `[N, heads, width]`; keys and values may have fewer heads than queries."""
        if has_kernel(value) and not dropout and self.runs is not None:
            scale = query.shape[2] ** -0.5 if scale is None else scale
            # Autocast rotates queries and keys in float32.
            return shared_attention(query.to(value.dtype), key.to(value.dtype), value, *self.runs, scale)
        repeats, first = query.shape[1] // key.shape[1], int(self.prompt_lengths.sum())
        if repeats > 1:
            key, value = (one.repeat_interleave(repeats, dim=1) for one in (key, value))
        asked, keys, values = (self.prompts.pad(states[:first]) for states in (query, key, value))
        outputs = F.scaled_dot_product_attention(asked, keys, values, dropout_p=dropout, is_causal=True, scale=scale)
        outputs = self.prompts.join(outputs)
        if not self.completions.shape[1]:
            return outputs
        asked, own_keys, own_values = (self.completions.pad(states[first:]) for states in (query, key, value))
        keys = torch.cat([_Gather.apply(keys, self.owners, False), own_keys], dim=2)
        values = torch.cat([_Gather.apply(values, self.owners, False), own_values], dim=2)
        written = F.scaled_dot_product_attention(
            asked, keys, values, attn_mask=self.mask, dropout_p=dropout, scale=scale
        )
        return torch.cat([outputs, self.completions.join(written)])


def shared_prompt_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    layout: SharedPrompts | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Call `SharedPrompts.attend` as transformers does: states `[1, heads, N, width]`, output `[1, N, heads, width]`.

    Raises:
        ValueError: the model needs an unsupported argument, or `layout` did not reach the attention.
    """
    if layout is None or attention_mask is not None or any(others.get(name) is not None for name in UNSUPPORTED):
        raise unsupported(module, {**others, "layout": layout, "attention_mask": attention_mask}, "model.share_prompts")
    states = (one.squeeze(0).transpose(0, 1) for one in (query, key, value))
    output = layout.attend(*states, scale=scaling, dropout=dropout)
    return output.unsqueeze(0), None


def unsupported(module: torch.nn.Module, given: dict[str, Any], option: str) -> ValueError:
    """Return the error for a model that an attention with its own layout can't serve; `option` turns it off."""
    wanted = [name for name in (*UNSUPPORTED, "attention_mask") if given.get(name) is not None]
    why = "layout is missing" if given["layout"] is None else f"{', '.join(wanted)} is not supported"
    return ValueError(f"{type(module).__name__}: {why}; set {option} to false for this policy")


def plan_shared(
    owner: Sequence[int] | np.ndarray,
    prompts: Sequence[int] | np.ndarray,
    completions: Sequence[int] | np.ndarray,
    max_tokens: int,
) -> list[list[int]]:
    """Split completions into micro-batches of up to `max_tokens`, counting a prompt once per micro-batch.

    The completions of a prompt stay together if they fit. The longest come first, so that attention pads little and a
    budget too large for the memory fails at once.

    Args:
        owner: int `[N]`: the prompt of each completion, `0 .. g - 1`.
        prompts: `g` lengths in tokens.
        completions: `N` lengths in tokens.
        max_tokens: the budget, at least 1; a single completion with its prompt may exceed it.

    Returns:
        Indices into `completions`; each appears exactly once. Depends on the arguments alone.

    Raises:
        ValueError: `max_tokens` below 1.
    """
    if max_tokens < 1:
        raise ValueError(f"max_tokens={max_tokens}: expected at least 1")
    owner, lengths = np.asarray(owner, dtype=np.int64), np.asarray(completions, dtype=np.int64)
    longest = np.zeros(len(prompts), dtype=np.int64)
    np.maximum.at(longest, owner, lengths)
    whole = np.array(prompts, dtype=np.int64)
    np.add.at(whole, owner, lengths - 1)
    plan: list[list[int]] = []
    room, last = 0, -1
    for index in np.lexsort((-lengths, owner, -longest[owner])).tolist():
        prompt, tokens = int(owner[index]), int(lengths[index]) - 1
        # Open a new micro-batch rather than split a prompt's completions, unless no micro-batch holds them all.
        starts = prompt != last
        needed = tokens + int(prompts[prompt]) if starts else tokens
        if needed > room or (starts and room < whole[prompt] <= max_tokens):
            plan.append([])
            room, needed = max_tokens, tokens + int(prompts[prompt])
        plan[-1].append(index)
        room, last = room - needed, prompt
    return plan


class _Pad(torch.autograd.Function):
    """Rows `values[tokens]`; in the backward pass, those at `places` carry the gradient of one row each."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, tokens: Tensor, places: Tensor) -> Tensor:
        ctx.save_for_backward(places)
        return values.index_select(0, tokens)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (places,) = ctx.saved_tensors
        return grad.index_select(0, places), None, None


class _Gather(torch.autograd.Function):
    """Rows `values[index]`, whose gradient is copied back (`distinct` rows) or added up (repeated rows).

    On a CPU, index_select's own backward works number by number; whole rows are faster.
    """

    @staticmethod
    def forward(ctx: Any, values: Tensor, index: Tensor, distinct: bool) -> Tensor:
        ctx.save_for_backward(index)
        ctx.rows, ctx.distinct = len(values), distinct
        return values.index_select(0, index)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (index,) = ctx.saved_tensors
        rows = grad.new_zeros(ctx.rows, *grad.shape[1:])
        return (rows.index_copy_ if ctx.distinct else rows.index_add_)(0, index, grad), None, None
