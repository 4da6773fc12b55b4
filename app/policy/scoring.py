"""Log-probabilities of completion tokens under a Hugging Face causal language model, without its logits."""

from __future__ import annotations

from functools import partial
from types import MethodType

import torch
from torch import Tensor
from torch.distributed.fsdp import register_fsdp_forward_method
from transformers import AttentionInterface, PreTrainedModel

from app.objective.logprobs import token_logprobs
from app.objective.packing import PackedBatch
from app.objective.shared_prompt import shared_prompt_attention
from app.policy.model import attending, causal_lm, full_attention_only, plain_attention

SHARED_PROMPT = "dots_shared_prompt"
_AS_FORWARD = "dots_score"
AttentionInterface.register(SHARED_PROMPT, shared_prompt_attention)


def score(
    model: torch.nn.Module, packed: PackedBatch, temperature: float, *, with_entropy: bool
) -> tuple[Tensor, Tensor | None]:
    """Log-probability and entropy of every completion token, float32 `[T]` each, differentiable.

    The head is applied to the predicting positions only, tile by tile; the tensor tokens x vocabulary never exists.
    `temperature` is the one that the completions were sampled with.
    """
    lm = causal_lm(model)
    scored = getattr(lm, _AS_FORWARD, None) or partial(_score, lm)
    return scored(packed, temperature, with_entropy)


def score_as_forward(lm: PreTrainedModel) -> None:
    """Makes FSDP2 treat `score` as the forward pass of a model that it has cut: weights are whole meanwhile."""
    setattr(lm, _AS_FORWARD, MethodType(_score, lm))
    register_fsdp_forward_method(lm, _AS_FORWARD)


def _score(
    lm: PreTrainedModel, packed: PackedBatch, temperature: float, with_entropy: bool
) -> tuple[Tensor, Tensor | None]:
    hidden = _rectangle(lm, packed) if packed.layout is None else _shared(lm, packed)
    head = lm.get_output_embeddings()
    return token_logprobs(
        packed.predicting(hidden),
        head_weight(head),
        packed.targets,
        getattr(head, "bias", None),
        temperature=temperature,
        softcap=getattr(lm.config, "final_logit_softcapping", None),
        scale=logit_scale(lm),
        with_entropy=with_entropy,
    )


def can_share_prompts(model: torch.nn.Module) -> bool:
    """Whether `score` takes batches of `packing.pack` for this model: full attention only, by transformers' interface.

    Not with gradient checkpointing, which runs layers again in the backward pass, when attention is the model's own.
    """
    lm = causal_lm(model)
    return plain_attention(lm) and lm.config._attn_implementation == "sdpa" and not lm.is_gradient_checkpointing


def _rectangle(lm: PreTrainedModel, packed: PackedBatch) -> Tensor:
    """Last hidden states `[n, L, H]` of a padded micro-batch."""
    return lm.base_model(
        input_ids=packed.input_ids,
        # On the right of causal attention padding is unseen; the mask is for models that mix positions otherwise.
        attention_mask=packed.attention_mask
        if packed.padding_fraction and not full_attention_only(lm.config)
        else None,
        position_ids=packed.position_ids,
        use_cache=False,
    ).last_hidden_state


def _shared(lm: PreTrainedModel, packed: PackedBatch) -> Tensor:
    """Last hidden states `[1, N, H]` of a micro-batch in one row."""
    with attending(lm, SHARED_PROMPT):
        return lm.base_model(
            input_ids=packed.input_ids, position_ids=packed.position_ids, layout=packed.layout, use_cache=False
        ).last_hidden_state


def head_weight(head: torch.nn.Module) -> Tensor:
    """`[V, H]`: the output embedding, with its LoRA update added when it has one."""
    base = head.get_base_layer().weight if hasattr(head, "get_base_layer") else head.weight  # type: ignore[operator]
    for adapter in getattr(head, "active_adapters", []):
        base = base + head.get_delta_weight(adapter)  # type: ignore[operator]
    return base  # type: ignore[return-value]


def logit_scale(lm: PreTrainedModel) -> float:
    """Factor from head output to logits: Cohere multiplies by `logit_scale`, Granite divides by `logits_scaling`."""
    if (scale := getattr(lm.config, "logit_scale", None)) is not None:
        return float(scale)
    return 1.0 / float(getattr(lm.config, "logits_scaling", None) or 1.0)
