"""How forward passes of a policy run: with or without dropout, recomputed activations and its own attention.

A file for private names of transformers: `_attn_implementation` is the only way to switch attention for a single
forward pass (`set_attn_implementation` reloads it for every submodule), and `_gradient_checkpointing_func` runs a layer
that recomputes its activations.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer


def switch_off_dropout(model: torch.nn.Module) -> None:
    """Make forward passes the same as in rollouts: dropout, skipped layers and router noise are off.

    Only adapters keep their dropout, because `Lora.dropout` asks for it, and layers that recompute their activations
    keep the flag by which they do so.
    """
    model.eval()
    for name, module in model.named_modules():
        recomputes = isinstance(module, GradientCheckpointingLayer) and module.gradient_checkpointing
        module.training = recomputes or "lora_dropout" in name


class Recompute:
    """How a layer of `lm` recomputes its activations: with the attention of the forward pass, and without dropout.

    `layer.training` decides whether they are recomputed, but not whether the layer drops any.
    """

    def __init__(self, lm: PreTrainedModel, layer: GradientCheckpointingLayer) -> None:
        self.lm, self.layer, self._checkpointed = lm, layer, layer._gradient_checkpointing_func
        layer._gradient_checkpointing_func = self  # type: ignore[assignment]

    def __call__(self, forward: Callable[..., Any], *args: Any) -> Any:
        implementation = self.lm.config._attn_implementation

        def evaluated(*args: Any) -> Any:
            self.layer.training = False
            try:
                with attending(self.lm, implementation):
                    return forward(*args)
            finally:
                self.layer.training = True

        return self._checkpointed(evaluated, *args)  # type: ignore[operator]  # a module to torch


def recomputes_alike(layers: Iterable[torch.nn.Module]) -> bool:
    """Return whether all layers recompute with the attention of the forward pass."""
    return all(isinstance(getattr(layer, "_gradient_checkpointing_func", None), Recompute) for layer in layers)


@contextmanager
def evaluating(model: torch.nn.Module) -> Iterator[None]:
    """Switch to evaluation mode (no dropout, and no gradient checkpointing, which disables the cache), then back."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


@contextmanager
def attending(lm: PreTrainedModel, implementation: str | None) -> Iterator[None]:
    """Run forward passes with a registered attention implementation; None keeps the model's own."""
    own = lm.config._attn_implementation
    lm.config._attn_implementation = implementation or own
    try:
        yield
    finally:
        lm.config._attn_implementation = own
