"""Decoder layers with half the kernels: for GPUs, where a small kernel costs its launch more than its work.

Queries, keys and values are one matrix product, and gate and up another. Norm and rotation are not composed of six and
ten operators, and what several matrices read is cast once. Values are those of the layer's own forward to rounding.

A file for private names of transformers: `_attn_implementation` names the attention that a layer calls.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AttentionInterface, PreTrainedModel
from transformers.models.qwen3.modeling_qwen3 import Qwen3Attention

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
"""Families of transformers whose decoder layer is the one below. Others differ in ways that names don't show."""

_ATTENTIONS = AttentionInterface()
Linear = tuple[Tensor, Tensor | None]
"""Weight and bias."""


@dataclass(frozen=True, slots=True, eq=False)
class LayerWeights:
    """The matrices of a layer as it multiplies with them, in the dtype of the computation."""

    qkv: Linear
    out: Linear
    gate_up: Linear
    down: Linear

    @classmethod
    def of(cls, layer: FusedLayer, dtype: torch.dtype) -> LayerWeights:
        return cls(*(_joined(linears, dtype) for linears in layer.products))


class FusedLayer(torch.nn.Module):
    """A decoder layer of `FAMILIES` with another forward; its modules, weights and their names stay as they are.

    On a CPU without autocast, where nothing is launched or cast, it is the layer's own forward.
    """

    input_layernorm: Any
    post_attention_layernorm: Any
    self_attn: Any
    mlp: Any
    held: LayerWeights | None = None
    gated: Any = None
    """Liger's function of joined rows of gate and up: one kernel, which keeps them alone (`app.policy.liger`)."""

    @property
    def products(self) -> tuple[tuple[Any, ...], ...]:
        """The linear layers of each matrix product."""
        attention, mlp = self.self_attn, self.mlp
        read = attention.q_proj, attention.k_proj, attention.v_proj
        return read, (attention.o_proj,), (mlp.gate_proj, mlp.up_proj), (mlp.down_proj,)

    @property
    def can_fuse(self) -> bool:
        """Whether the matrices are plain ones, without adapters."""
        return all(type(linear) is torch.nn.Linear for linears in self.products for linear in linears)

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        use_cache: bool | None = False,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        **others: Any,
    ) -> Tensor:
        attention = _ATTENTIONS.get(self.self_attn.config._attn_implementation)
        if attention is None or position_embeddings is None or not pays(hidden_states) or not self.can_fuse:
            output: Tensor = super().forward(  # of the class that this one is put before
                hidden_states, attention_mask=attention_mask, position_ids=position_ids,
                past_key_values=past_key_values, use_cache=use_cache, position_embeddings=position_embeddings, **others,
            )  # fmt: skip
            return output
        return self.fused(
            hidden_states, position_embeddings, attention, past_key_values,
            attention_mask=attention_mask, position_ids=position_ids, **others,
        )  # fmt: skip

    def fused(
        self, hidden: Tensor, rotation: tuple[Tensor, Tensor], attention: Any, cache: Any = None, **others: Any
    ) -> Tensor:
        """Return the layer's output `[n, L, H]`.

        Args:
            hidden: `[n, L, H]`.
            rotation: cosine and sine of each position, `[n, L, head_dim]`.
            attention: called as transformers calls it, with `others`.
            cache: keys and values of earlier positions.
        """
        module, dtype, weights = self.self_attn, hidden.dtype, None
        if torch.is_autocast_enabled(hidden.device.type):
            dtype = torch.get_autocast_dtype(hidden.device.type)
            weights = LayerWeights.of(self, dtype) if self.held is None else self.held
        qkv, out, gate_up, down = self.products
        states = _norm(hidden, self.input_layernorm, dtype)
        states = _product(states, qkv, None if weights is None else weights.qkv).unflatten(2, (-1, module.head_dim))
        keys = module.k_proj.out_features // module.head_dim
        heads = states.shape[2] - 2 * keys
        asked, value = states.split([heads + keys, keys], dim=2)
        if isinstance(module, Qwen3Attention):  # of FAMILIES, the one that normalises heads
            query, key = asked.split([heads, keys], dim=2)
            asked = torch.cat([_norm(query, module.q_norm), _norm(key, module.k_norm)], dim=2)
        cosine, sine = (one.unsqueeze(2) for one in rotation)
        query, key = _Rotation.apply(asked, cosine, sine, dtype).split([heads, keys], dim=2)
        if torch.is_grad_enabled():
            value = value.contiguous()  # a view would keep queries and keys as they were before the rotation
        query, key, value = (one.transpose(1, 2) for one in (query, key, value))
        if cache is not None:
            key, value = cache.update(key, value, module.layer_idx)
        dropout = module.attention_dropout if module.training else 0.0
        states, _ = attention(module, query, key, value, dropout=dropout, scaling=module.scaling, **others)
        states = states.reshape(*hidden.shape[:2], -1)
        hidden = hidden + _product(states, out, None if weights is None else weights.out)
        states = _norm(hidden, self.post_attention_layernorm, dtype)
        states = _product(states, gate_up, None if weights is None else weights.gate_up)
        if self.gated is None:
            gate, up = states.chunk(2, dim=2)
            states = self.mlp.act_fn(gate) * up
        else:
            states = self.gated.apply(states.flatten(0, 1)).unflatten(0, hidden.shape[:2])
        return hidden + _product(states, down, None if weights is None else weights.down)


def pays(hidden: Tensor) -> bool:
    """Return whether the fused forward is worth another order of sums: on a GPU, or where autocast casts anyway."""
    return hidden.is_cuda or torch.is_autocast_enabled(hidden.device.type)


def fuse_layers(lm: PreTrainedModel) -> None:
    """Give the decoder layers of a model of `FAMILIES` the forward of `FusedLayer`; leave other models alone.

    All layers must attend to the whole context.
    """
    for layer in lm.modules():
        kind = type(layer)
        _, _, family = kind.__module__.rpartition(".modeling_")
        if family in FAMILIES and kind.__name__.endswith("DecoderLayer"):
            layer.__class__ = type(kind.__name__, (FusedLayer, kind), {"__module__": __name__})


@contextmanager
def holding_weights(lm: PreTrainedModel) -> Iterator[None]:
    """Keep the fused layers' matrices in autocast's dtype: each is cast once and not in every forward pass.

    For passes without gradients, between which the weights don't change. Without autocast nothing is cast or kept.
    """
    kind = lm.device.type
    layers = [layer for layer in lm.modules() if isinstance(layer, FusedLayer) and layer.can_fuse]
    if torch.is_autocast_enabled(kind):
        for layer in layers:
            layer.held = LayerWeights.of(layer, torch.get_autocast_dtype(kind))
    try:
        yield
    finally:
        for layer in layers:
            layer.held = None


def _joined(linears: Sequence[torch.nn.Linear], dtype: torch.dtype) -> Linear:
    weights: list[Tensor] = [one.weight for one in linears]
    biases: list[Tensor] = [one.bias for one in linears if one.bias is not None]
    if len(linears) == 1:
        return weights[0].to(dtype), biases[0].to(dtype) if biases else None
    return torch.cat(weights).to(dtype), torch.cat(biases).to(dtype) if biases else None


def _product(states: Tensor, linears: Sequence[torch.nn.Linear], joined: Linear | None) -> Tensor:
    if joined is not None:
        return F.linear(states, *joined)
    # Without a cast, joined weights would be a copy that the backward pass keeps.
    parts = [linear(states) for linear in linears]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)


def _norm(states: Tensor, norm: Any, dtype: torch.dtype | None = None) -> Tensor:
    weight: Tensor = norm.weight
    return F.rms_norm(states.to(weight.dtype), weight.shape, weight, norm.variance_epsilon).to(dtype or weight.dtype)


class _Rotation(torch.autograd.Function):
    """Rotate the halves of each head: `x cos + (-x_2, x_1) sin`, computed in the wider of both types."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, cosine: Tensor, sine: Tensor, dtype: torch.dtype) -> Tensor:
        ctx.save_for_backward(cosine, sine)
        ctx.dtype = states.dtype
        half = states.shape[-1] // 2
        output = states * cosine
        output[..., :half].addcmul_(states[..., half:], sine[..., :half], value=-1)
        output[..., half:].addcmul_(states[..., :half], sine[..., half:])
        return output.to(dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        cosine, sine = ctx.saved_tensors
        half = grad.shape[-1] // 2
        output = grad * cosine
        output[..., :half].addcmul_(grad[..., half:], sine[..., half:])
        output[..., half:].addcmul_(grad[..., :half], sine[..., :half], value=-1)
        return output.to(ctx.dtype), None, None, None
