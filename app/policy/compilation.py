"""Decoder layers compiled with `torch.compile` for the update, and left as they are for generation."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from typing import Any

import torch

from app.policy.model import decoder_layers
from datamodules.errors import UserError


def compile_layers(policy: torch.nn.Module) -> None:
    """Give the policy's decoder layers a compiled forward that is used whenever gradients are enabled.

    The layers keep their parameters, names and hooks: a checkpoint is the same with and without compilation, and
    wrappers of a layer (sharding, gradient checkpointing) still apply. Generation runs without gradients and is not
    compiled, because its growing caches and shrinking batches would trigger recompilation again and again.

    Raises UserError on a CPU without a C++ compiler.
    """
    compiler = os.environ.get("CXX", "g++")
    if next(policy.parameters()).device.type == "cpu" and shutil.which(compiler) is None:
        raise UserError(
            f"model.compile needs a C++ compiler, but {compiler!r} was not found. Install one, set CXX, or set "
            "model.compile to false"
        )
    for layer in decoder_layers(policy):
        layer.forward = _with_gradients(torch.compile(layer.forward, dynamic=True), layer.forward)


def _with_gradients(compiled: Callable[..., Any], plain: Callable[..., Any]) -> Callable[..., Any]:
    def forward(*args: Any, **kwargs: Any) -> Any:
        return (compiled if torch.is_grad_enabled() else plain)(*args, **kwargs)

    return forward
