"""Decoder layers compiled by `torch.compile` for the update, and as they were for generation."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from typing import Any

import torch

from app.policy.model import decoder_layers
from datamodules.errors import UserError


def compile_layers(policy: torch.nn.Module) -> None:
    """Gives the policy's decoder layers a compiled forward, used wherever gradients are asked for.

    The layers keep their parameters, names and hooks: a checkpoint is the same with and without, and what wraps a layer
    (sharding, gradient checkpointing) still does. Generation asks for no gradients: its growing caches and shrinking
    batches would compile again and again. Sizes are dynamic, and all layers of a kind share one compiled code.

    Raises UserError on a CPU without a C++ compiler.
    """
    compiler = os.environ.get("CXX", "g++")
    if next(policy.parameters()).device.type == "cpu" and shutil.which(compiler) is None:
        raise UserError(
            f"model.compile needs a C++ compiler, and {compiler!r} is not found: install one, set CXX, or set "
            "model.compile to false"
        )
    for layer in decoder_layers(policy):
        layer.forward = _where_trained(torch.compile(layer.forward, dynamic=True), layer.forward)


def _where_trained(compiled: Callable[..., Any], plain: Callable[..., Any]) -> Callable[..., Any]:
    def forward(*args: Any, **kwargs: Any) -> Any:
        return (compiled if torch.is_grad_enabled() else plain)(*args, **kwargs)

    return forward
