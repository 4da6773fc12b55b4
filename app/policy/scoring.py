"""Log-probabilities of generated tokens under a Hugging Face causal language model, without its logits."""

from __future__ import annotations

from functools import partial
from types import MethodType
from typing import Literal

import torch
from torch import Tensor
from torch.distributed.fsdp import register_fsdp_forward_method
from transformers import AttentionInterface, PreTrainedModel

from app.objective.logprobs import HeadPrecision, token_logprobs
from app.objective.packing import PackedBatch
from app.objective.shared_prompt import shared_prompt_attention
from app.objective.sketches import TokenSketch
from app.policy.adapters import adapted_weight, causal_lm
from app.policy.model import HEAD_PRECISION, decoder_layers, full_attention_only, plain_attention, uses_sdpa
from app.policy.modes import attending, recomputes_alike

SHARED_PROMPT = "dots_shared_prompt"
_FORWARD_METHOD = "dots_completion_logprobs"
AttentionInterface.register(SHARED_PROMPT, shared_prompt_attention)


def completion_logprobs(
    model: torch.nn.Module,
    packed: PackedBatch,
    temperature: float,
    *,
    with_entropy: bool,
    sketch: TokenSketch | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Return the log-probability and the entropy of every generated token, float32 `[T]` each, differentiable.

    The head is applied to the predicting positions only, tile by tile; a tokens x vocabulary tensor never exists.
    `temperature` must be the sampling temperature of the completions. Entropy is None without `with_entropy`. The
    backward pass adds the tokens' gradients with respect to the head to `sketch`.
    """
    lm = causal_lm(model)
    forward = getattr(lm, _FORWARD_METHOD, None) or partial(_completion_logprobs, lm)
    return forward(packed, temperature, with_entropy, sketch)


def register_logprobs_forward(lm: PreTrainedModel) -> None:
    """Make FSDP2 gather a sharded model's weights in `completion_logprobs`, as it does in the model's forward pass."""
    setattr(lm, _FORWARD_METHOD, MethodType(_completion_logprobs, lm))
    register_fsdp_forward_method(lm, _FORWARD_METHOD)


def _completion_logprobs(
    lm: PreTrainedModel, packed: PackedBatch, temperature: float, with_entropy: bool, sketch: TokenSketch | None = None
) -> tuple[Tensor, Tensor | None]:
    if packed.layout is None:
        # Causal attention never sees padding on the right; models that mix positions differently need the mask.
        needs_mask = packed.padding_fraction and not full_attention_only(lm.config)
        hidden = lm.base_model(
            input_ids=packed.input_ids,
            attention_mask=packed.attention_mask if needs_mask else None,
            position_ids=packed.position_ids,
            use_cache=False,
        ).last_hidden_state
    else:
        with attending(lm, SHARED_PROMPT):
            hidden = lm.base_model(
                input_ids=packed.input_ids, position_ids=packed.position_ids, layout=packed.layout, use_cache=False
            ).last_hidden_state
    head = lm.get_output_embeddings()
    return token_logprobs(
        packed.predicting(hidden),
        adapted_weight(head),
        packed.targets,
        getattr(head, "bias", None),
        temperature=temperature,
        softcap=getattr(lm.config, "final_logit_softcapping", None),
        scale=logit_scale(lm),
        with_entropy=with_entropy,
        precision=head_precision(lm, hidden),
        sketch=sketch,
    )


def head_precision(lm: PreTrainedModel, hidden: Tensor) -> HeadPrecision:
    """Return the precision of the head's products on last hidden states; see `Policy.head_precision`."""
    chosen: HeadPrecision | Literal["auto"] = getattr(lm, HEAD_PRECISION, "auto")
    if chosen != "auto":
        return chosen
    kind = hidden.device.type
    computed = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype
    return "bfloat16" if kind == "cuda" and computed == torch.bfloat16 else "float32"


def can_share_prompts(model: torch.nn.Module) -> bool:
    """Return whether the model can read batches of `packing.pack`.

    It needs full attention through transformers' interface, also where gradient checkpointing runs a layer again.
    """
    lm = causal_lm(model)
    recomputes = not lm.is_gradient_checkpointing or recomputes_alike(decoder_layers(lm))
    return plain_attention(lm) and uses_sdpa(lm) and recomputes


def logit_scale(lm: PreTrainedModel) -> float:
    """Return the factor on the logits: Cohere multiplies by `logit_scale`, Granite divides by `logits_scaling`."""
    if (scale := getattr(lm.config, "logit_scale", None)) is not None:
        return float(scale)
    return 1.0 / float(getattr(lm.config, "logits_scaling", None) or 1.0)
