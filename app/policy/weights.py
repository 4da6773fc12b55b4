"""The policy's weights: under the names that an engine expects, from a checkpoint, and as a Hugging Face folder."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch.distributed.tensor import DTensor
from transformers import PreTrainedTokenizerBase

from app.policy.model import causal_lm, tied_weight_names
from app.runs import checkpoint_files
from app.runs.sharded_checkpoint import whole_weights

CHECKPOINT_PREFIX = "policy_model."
"""Prefix of the policy's tensors in a checkpoint."""


def is_adapted(model: torch.nn.Module) -> bool:
    """Return True if only adapters of the model are trained: if peft wraps it."""
    return hasattr(model, "merge_adapter")


def plain_weights(model: torch.nn.Module, changing: bool = False) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield names and tensors of the architecture without adapters, as an engine expects them.

    LoRA is merged while the iteration lasts. Adapted tensors are copies, so that an engine can read one after the
    adapters have been unmerged. A head tied to the embedding is left out, as in the model's own file. The tensors of a
    sharded policy are gathered one at a time: all ranks must iterate to the end together.

    Args:
        model: the policy.
        changing: leave out blocks that training does not change. All weights of a block with an adapted layer are
            kept, because engines merge several of its layers (queries, keys and values) and replace them as one.
    """
    lm = causal_lm(model)
    tied = tied_weight_names(lm)
    if not is_adapted(model):
        yield from ((name, _gathered(tensor)) for name, tensor in model.state_dict().items() if name not in tied)
        return
    peft: Any = model
    peft.merge_adapter()
    try:
        weights = lm.state_dict()
        blocks = {_block(name) for name in weights if ".base_layer" in name}
        for name, tensor in weights.items():
            if "lora_" not in name and name not in tied and (_block(name) in blocks or not changing):
                yield name.replace(".base_layer", ""), _gathered(tensor.clone() if ".base_layer" in name else tensor)
    finally:
        peft.unmerge_adapter()


def _gathered(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _block(name: str) -> str:
    """Return the block of a weight: `model.layers.0.mlp` for `model.layers.0.mlp.up_proj.weight`."""
    return name.replace(".base_layer", "").rpartition(".")[0].rpartition(".")[0]


def count_parameters(model: torch.nn.Module) -> tuple[int, int]:
    """Return the number of all parameters and of the trainable ones."""
    sizes = [(parameter.numel(), parameter.requires_grad) for parameter in model.parameters()]
    return sum(size for size, _ in sizes), sum(size for size, trained in sizes if trained)


def export(model: torch.nn.Module, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write a Hugging Face folder that `from_pretrained` loads, with adapters merged into the weights.

    A model with adapters cannot be used afterwards: peft unloads them.
    """
    policy: Any = model
    (policy.merge_and_unload() if is_adapted(model) else policy).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def checkpoint_weights(path: Path) -> dict[str, torch.Tensor]:
    """Return the policy's tensors from a checkpoint, a file or a folder. Raises UserError if Dots did not write it."""
    if path.is_dir():
        checkpoint_files.check(path)
        state = whole_weights(path)
    else:
        state = checkpoint_files.read(path)["state_dict"]
    prefix = CHECKPOINT_PREFIX
    return {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}
