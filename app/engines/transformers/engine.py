"""Rollouts with the policy itself, in the trainer's process: any Hugging Face causal LM, without copying weights."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from transformers import PreTrainedModel

from app.engines.ahead import Groups
from app.engines.base import Completed, RolloutEngine, Sampling, check_counts, check_request, limits_of
from app.engines.transformers.generation import Generation, PilotGeneration
from app.engines.transformers.turns import TurnGeneration
from app.engines.turns import Conversations
from app.policy.adapters import causal_lm
from app.policy.fused_layers import holding_weights
from app.policy.modes import evaluating
from datamodules.errors import UserError
from datamodules.types import Prompt


class Transformers(RolloutEngine):
    """Generates with the policy's own module, so `push` has nothing to copy.

    If all layers of the policy attend to the whole context, each prompt is prefilled once, and its keys and values are
    stored and read once for all its completions. Finished rows leave the batch immediately, and waiting prompts take
    their place.

    Args:
        max_rows: maximum number of completions decoded together.
        max_cache_tokens: limit on rows x (longest prompt + max_completion_length), and so on the memory of the
            key-value cache; fewer rows are decoded together if they would exceed it. null for what fits in the free
            memory of a GPU, and 262,144 on a CPU.
        prefill_tokens: prompt tokens (including padding) in one forward pass.
        share_prompts: false decodes with the model's own attention and cache, which copies the prompt to every row;
            for policies whose attention needs something that `decode_attention` does not support.
        cuda_graphs: on a GPU, whether the kernels of a token are recorded as CUDA graphs, which are launched together.
            Needs `share_prompts`; sharded policies are decoded without.
    """

    uses_policy = True

    def __init__(
        self,
        max_rows: int = 256,
        max_cache_tokens: int | None = None,
        prefill_tokens: int = 16_384,
        share_prompts: bool = True,
        cuda_graphs: bool = True,
    ) -> None:
        self.max_rows, self.max_cache_tokens, self.prefill_tokens = max_rows, max_cache_tokens, prefill_tokens
        self.share_prompts, self.cuda_graphs = share_prompts, cuda_graphs
        check_counts("engine", self, "max_rows", "max_cache_tokens", "prefill_tokens")
        self.version = 0

    def prepare(self) -> None:
        lm = causal_lm(self.model)
        accepted = inspect.signature(lm.forward).parameters
        if "past_key_values" not in accepted:
            raise UserError(
                f"{type(lm).__name__} has no key-value cache (its forward does not accept past_key_values), but "
                "engines.Transformers needs one. Choose another policy or engine."
            )
        self._accepts_positions = "position_ids" in accepted
        self._accepts_logits_to_keep = "logits_to_keep" in accepted

    def push(self, named_tensors: Iterable[tuple[str, torch.Tensor]], version: int, since: int | None = None) -> None:
        """Record the version; the weights are the policy's own."""
        self.version = version

    def generate(
        self, prompts: Sequence[Prompt], sampling: Sampling, seeds: np.ndarray, limits: np.ndarray | None = None
    ) -> Groups:
        return self._run(prompts, sampling, seeds, limits, None)

    def generate_with_pilots(
        self, prompts: Sequence[Prompt], sampling: Sampling, seeds: np.ndarray, pilot: int, completed: Completed
    ) -> Groups:
        """See `RolloutEngine.generate_with_pilots`. The rest of a group is decoded beside the pilots of others."""
        return self._run(prompts, sampling, seeds, None, (pilot, completed))

    def converse(self, conversations: Conversations, sampling: Sampling) -> None:
        """See `RolloutEngine.converse`. A turn's keys and values are kept for the next one, where rows can join."""
        with _generating(self.model):
            TurnGeneration.of(self, conversations, sampling)

    def _run(
        self,
        prompts: Sequence[Prompt],
        sampling: Sampling,
        seeds: np.ndarray,
        limits: np.ndarray | None,
        pilots: tuple[int, Completed] | None,
    ) -> Groups:
        if len(prompts) == 0:
            return []
        limit = getattr(self.model.config.get_text_config(decoder=True), "max_position_embeddings", None)
        check_request(prompts, sampling, seeds, limit, f"the model's {limit} positions", limits)
        with _generating(self.model):
            generation = (
                Generation(self, prompts, sampling, seeds, limits_of(sampling, seeds, limits))
                if pilots is None
                else PilotGeneration(self, prompts, sampling, seeds, *pilots)
            )
            generation.run()
        return generation.groups()

    def forward(self, input_ids: torch.Tensor, position_ids: torch.Tensor, **cached: object) -> torch.Tensor:
        """Return the logits `[n, V]` at the last position of `[n, T]` tokens, whose context is `cached`."""
        optional: dict[str, object] = {"position_ids": position_ids} if self._accepts_positions else {}
        optional |= {"logits_to_keep": 1} if self._accepts_logits_to_keep else {}
        logits: torch.Tensor = self.model(input_ids=input_ids, use_cache=True, **cached, **optional).logits
        return logits[:, -1]


@contextmanager
def _generating(model: PreTrainedModel) -> Iterator[None]:
    """Switch to evaluation mode, without gradients; under autocast each weight is cast once and not for every token."""
    # Not inference_mode: tensors that a model caches during generation (rotary tables) must work with autograd.
    # Autocast caches weights cast without gradient; a later forward with gradient must not find them.
    cached = torch.is_autocast_cache_enabled()
    torch.clear_autocast_cache()
    torch.set_autocast_cache_enabled(True)
    # It caches only what requires a gradient, which frozen weights under adapters don't.
    autocast = torch.is_autocast_enabled(model.device.type)
    frozen = [one for one in model.parameters() if autocast and not one.requires_grad and one.is_floating_point()]
    for weight in frozen:
        weight.requires_grad_(True)
    try:
        with torch.no_grad(), evaluating(model), holding_weights(causal_lm(model)):
            yield
    finally:
        for weight in frozen:
            weight.requires_grad_(False)
        torch.set_autocast_cache_enabled(cached)
        torch.clear_autocast_cache()
