"""A module on a tiny float64 policy, without trainer, engine or reward workers: just enough for a gradient."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import Qwen2Config, Qwen2ForCausalLM

from app.module import GRPOModule
from app.policy.model import Policy
from app.policy.reference import ReferencePolicy
from app.rewards import Format
from datamodules.types import Completion, Prompt, RolloutGroup, Source

TINY = Path(__file__).parents[2] / "configs" / "tiny_policy"
"""Its tokenizer is used; its weights are not."""


def tiny_model(vocabulary: int, seed: int, spread: float = 0.3) -> Qwen2ForCausalLM:
    torch.manual_seed(seed)
    config = Qwen2Config(
        vocab_size=vocabulary, hidden_size=8, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=64, initializer_range=spread, tie_word_embeddings=False,
    )  # fmt: skip
    return Qwen2ForCausalLM(config).double()


def module_on(model: Qwen2ForCausalLM, reference: Qwen2ForCausalLM | None = None, **options: Any) -> GRPOModule:
    module = GRPOModule(Policy(str(TINY)), [Format(".*")], **options)
    module.policy_model = model
    module.reference = None if reference is None else ReferencePolicy(reference)
    return module


def group_of(
    prompt: Prompt, tokens: list[tuple[int, ...]], logprobs: list[np.ndarray], rewards: list[float], source: Source
) -> RolloutGroup:
    completions = tuple(
        Completion(np.array(ids, dtype=np.int32), np.asarray(values, dtype=np.float32), "stop", 0, "")
        for ids, values in zip(tokens, logprobs, strict=True)
    )
    values = np.array(rewards, dtype=np.float32)
    return RolloutGroup(prompt, completions, values, values, {"format": values}, source, 0)


def gradient(module: GRPOModule, groups: list[RolloutGroup]) -> Tensor:
    """Return the gradient of a batch's loss, flat; summed over its mini-batches, without an update in between."""
    learner = module.learner
    module.policy_model.zero_grad(set_to_none=True)
    for part in learner.minibatches_of(groups, learner.advantages_of(groups), step=0):
        if module.mini_batches > 1:
            part = learner.with_old_logprobs(part)  # as the training step does before its first update
        for packed in learner.microbatches.of(part.sequences):
            learner.loss_of(packed).loss.backward()
    return flat_gradient(module.policy_model)


def flat_gradient(model: torch.nn.Module) -> Tensor:
    """Return all gradients concatenated, `[P]`; 0 for a parameter without one."""
    parts = [torch.zeros_like(one) if one.grad is None else one.grad for one in model.parameters()]
    return torch.cat([part.flatten() for part in parts])
