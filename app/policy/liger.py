"""Liger's Triton kernels in a policy: norm, gated MLP and rotation are one kernel each, and keep less for backward.

Liger is an optional package, imported where a policy asks for it. Its fused loss stays out: `token_logprobs` computes
what it would.

A file for private names of transformers and Liger: Liger swaps classes and functions of the family's module in
transformers for the whole process, among them `apply_rotary_pos_emb`, which attention looks up there.
"""

from __future__ import annotations

import os
import sys
from types import FunctionType, MethodType
from typing import Any

from transformers import PreTrainedModel
from transformers.activations import ACT2FN
from transformers.integrations.liger import apply_liger_kernel

from app.policy.fused_layers import FusedLayer
from datamodules.errors import UserError

FAMILIES = {
    "gemma": "gelu_pytorch_tanh", "gemma2": "gelu_pytorch_tanh", "gemma3_text": "gelu_pytorch_tanh", "granite": "silu",
    "llama": "silu", "mistral": "silu", "olmo2": "silu", "olmo3": "silu", "phi3": "silu", "qwen2": "silu",
    "qwen3": "silu", "smollm3": "silu",
}  # fmt: skip
"""Model types whose values and gradients with Liger the tests compare, and the activation that its MLP computes."""

HAS_LIGER = "dots_has_liger"
"""Attribute of a model with Liger's kernels."""

_ROTATION = "apply_rotary_pos_emb"


def add_liger(lm: PreTrainedModel) -> None:
    """Give a model Liger's kernels, and nothing else in the process; weights and their names stay as they are.

    Fused layers (`fuse_layers`) go on with their own norms and rotation and take Liger's gated product of joined
    matrices; Liger's modules run where they don't fuse, such as under adapters.

    Raises UserError without Liger, and for a model that it would change or not reach.
    """
    _check(lm)
    try:
        from liger_kernel.ops import LigerFusedGateUpSiLUMulFunction
    except ImportError as error:
        raise UserError(
            f"policy.kernels is liger, but its kernels cannot be imported ({error}). They are in version 0.8.5 of a "
            "package for GPUs. Run: pip install liger-kernel"
        ) from error
    family = sys.modules[type(lm).__module__]
    own = dict(vars(family))
    try:
        apply_liger_kernel(lm, {"cross_entropy": False, "fused_linear_cross_entropy": False})
        rotation = getattr(family, _ROTATION)
    finally:
        vars(family).update(own)
    setattr(lm, HAS_LIGER, True)
    for module in lm.modules():
        forward = type(module).forward
        if isinstance(module, FusedLayer):
            module.gated = LigerFusedGateUpSiLUMulFunction
        elif isinstance(forward, FunctionType) and _ROTATION in forward.__code__.co_names:
            module.forward = MethodType(_with_global(forward, _ROTATION, rotation), module)


def refuse_liger(device: str, precision: str, *, compiles: bool) -> None:
    """Raise UserError where a policy with Liger's kernels cannot run, or not rightly."""
    given = "model.policy.kernels is liger, but"
    if device == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":  # which is how the tests compute the kernels
        raise UserError(f"{given} the run is on the CPU, and its kernels need a GPU. Leave it out.")
    if precision == "64-true":
        raise UserError(
            f"{given} trainer.precision is 64-true, and its kernels compute in float32. Leave one of them out."
        )
    if compiles:
        raise UserError(f"{given} model.compile is true, which fuses the same operators itself. Leave one of them out.")


def _check(lm: PreTrainedModel) -> None:
    family, given = lm.config.model_type, "policy.kernels is liger, but the policy's"
    if family not in FAMILIES:
        raise UserError(f"{given} family is {family}, expected one of {', '.join(FAMILIES)}. Leave policy.kernels out")
    # The attribute of the configuration that names it differs between families.
    own = [one for name, one in lm.named_modules() if name.rpartition(".")[2] in ("act_fn", "activation_fn")]
    if other := {type(one).__name__ for one in own if type(one) is not type(ACT2FN[FAMILIES[family]])}:
        raise UserError(
            f"{given} activation is {min(other)}, expected {FAMILIES[family]}, which Liger computes for {family} "
            "whatever its config.json says. Leave policy.kernels out"
        )


def _with_global(function: FunctionType, name: str, value: Any) -> FunctionType:
    """Return a copy of a function that finds another value under a global name."""
    globals_ = {**function.__globals__, name: value}
    copy = FunctionType(function.__code__, globals_, function.__name__, function.__defaults__, function.__closure__)
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy
