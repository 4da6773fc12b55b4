"""Low-rank adapters of a policy by peft, which is an optional package: it is imported where a policy has adapters."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from transformers import PreTrainedModel

from datamodules.errors import UserError

if TYPE_CHECKING:
    from peft import PeftModel


@dataclass
class Lora:
    """Low-rank adaptation with peft: only small added matrices are trained (Hu et al., arXiv 2106.09685).

    The matrices are float32; the weights that they adapt keep the dtype of their file.

    Args:
        rank: rank of the added matrices.
        alpha: their product is scaled by `alpha / rank`.
        dropout: dropout on the adapters' input in updates, which rollouts do not have; see `updates/dropout`.
        target_modules: names of the linear layers to adapt; "all-linear" adapts all but the head.
    """

    rank: int = 16
    alpha: float = 32.0
    dropout: float = 0.0
    target_modules: list[str] = field(default_factory=lambda: ["all-linear"])

    def __post_init__(self) -> None:
        for name, fits, expected in [
            ("rank", self.rank >= 1, "1 or more"),
            ("alpha", 0 < self.alpha < float("inf"), "a number above 0"),
            ("dropout", 0 <= self.dropout < 1, "0 or more and below 1"),
        ]:
            if not fits:
                raise UserError(f"policy.lora.{name} is {getattr(self, name)}; set it to {expected}.")


def add_lora(model: PreTrainedModel, lora: Lora) -> torch.nn.Module:
    """Wrap `model` with peft and freeze its own weights. Raises UserError without peft or for unsuitable options."""
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise UserError("policy.lora is set, but peft is not installed. Run: pip install peft") from error
    model.enable_input_require_grads()
    config = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,  # type: ignore[arg-type]  # peft's annotation says int, its arithmetic takes any number
        lora_dropout=lora.dropout,
        target_modules="all-linear" if lora.target_modules == ["all-linear"] else lora.target_modules,
        task_type="CAUSAL_LM",
    )
    try:
        adapted = get_peft_model(model, config)
    except ValueError as error:
        raise UserError(
            f"policy.lora.target_modules={lora.target_modules}: {' '.join(str(error).split())}. "
            'Expected names of linear layers, or ["all-linear"]'
        ) from error
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name.replace(".base_layer", ""))
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if ".base_layer" in name and len(shared := names[id(parameter)]) > 1:
            raise UserError(
                f"policy.lora.target_modules={lora.target_modules}: {shared[0]} and {shared[1]} are one tensor, which "
                "an adapter of one of them would split in two. Leave both out of target_modules"
            )
    return adapted


def peft_model(model: torch.nn.Module) -> PeftModel | None:
    """Return the policy as peft's model, or None if it has no adapters: all its weights are trained."""
    if "peft" not in sys.modules:  # nothing can have been adapted, and the import takes a second
        return None
    from peft import PeftModel

    return model if isinstance(model, PeftModel) else None


def is_adapted(model: torch.nn.Module) -> bool:
    """Return whether only adapters of the policy are trained."""
    return peft_model(model) is not None


def causal_lm(model: torch.nn.Module) -> PreTrainedModel:
    """Return the Hugging Face model of a policy, without peft around it; its adapters stay active."""
    adapted = peft_model(model)
    return model if adapted is None else adapted.get_base_model()  # type: ignore[return-value]  # a module to torch


def adapted_weight(layer: torch.nn.Module) -> Tensor:
    """Return the weight of a layer, with its LoRA update if it has one that is not switched off."""
    if "peft" in sys.modules:
        from peft.tuners.lora import LoraLayer

        if isinstance(layer, LoraLayer):
            weight: Tensor = layer.get_base_layer().weight  # type: ignore[assignment]  # a module to peft
            for adapter in [] if layer.disable_adapters else layer.active_adapters:
                weight = weight + layer.get_delta_weight(adapter)  # type: ignore[operator]  # of each kind of layer
            return weight
    return layer.weight  # type: ignore[return-value]  # a module to torch
