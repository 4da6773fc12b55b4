"""The policy's weights: by the names an engine expects, out of a checkpoint, and exported as a Hugging Face folder."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from app.policy.model import causal_lm
from app.runs import checkpoint_files
from app.runs.sharded_checkpoint import whole_weights

CHECKPOINT_PREFIX = "policy_model."
"""Of the policy's tensors among those of a checkpoint."""


def is_adapted(model: Any) -> bool:
    """Whether only adapters of the model are trained."""
    return hasattr(model, "merge_adapter")


def plain_weights(model: Any, changing: bool = False) -> Iterator[tuple[str, torch.Tensor]]:
    """Names and tensors of the unadapted architecture, as an engine expects them: LoRA is merged while iterating.

    Adapted tensors are copies: an engine may look at one after the adapters have been taken out again. An output head
    that is the embedding is left out, as in a checkpoint's file. Of a policy that is cut over processes one tensor at a
    time is made whole: all of them iterate to the end together.

    Args:
        model: the policy.
        changing: leave out what training does not change. What stands beside an adapted layer in the same block is
            kept: engines make one layer of several such (queries, keys and values), and replace it as one.
    """
    tied = _tied(causal_lm(model))
    if not hasattr(model, "merge_adapter"):
        yield from ((name, _whole(tensor)) for name, tensor in model.state_dict().items() if name not in tied)
        return
    model.merge_adapter()
    try:
        weights = causal_lm(model).state_dict()
        blocks = {_block(name) for name in weights if ".base_layer" in name}
        for name, tensor in weights.items():
            if "lora_" not in name and name not in tied and (_block(name) in blocks or not changing):
                yield name.replace(".base_layer", ""), _whole(tensor.clone() if ".base_layer" in name else tensor)
    finally:
        model.unmerge_adapter()


def _whole(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _tied(model: PreTrainedModel) -> set[str]:
    """Names of weights that are others under a second name."""
    return set(model._tied_weights_keys or ()) if getattr(model.config, "tie_word_embeddings", False) else set()


def _block(name: str) -> str:
    """Of the layer that a weight belongs to: `model.layers.0.mlp` of `model.layers.0.mlp.up_proj.weight`."""
    return name.replace(".base_layer", "").rpartition(".")[0].rpartition(".")[0]


def count_parameters(model: torch.nn.Module) -> tuple[int, int]:
    """All parameters and the trainable ones among them."""
    sizes = [(parameter.numel(), parameter.requires_grad) for parameter in model.parameters()]
    return sum(size for size, _ in sizes), sum(size for size, trained in sizes if trained)


def export(model: Any, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Writes a Hugging Face folder that `from_pretrained` loads; adapters are merged into the weights.

    The model itself is used up when it has adapters (peft unloads them).
    """
    merged = model.merge_and_unload() if hasattr(model, "merge_and_unload") else model
    merged.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def checkpoint_weights(path: Path) -> dict[str, Any]:
    """The policy's tensors of a checkpoint, a file or a folder. Raises UserError when it is not one of ours."""
    if path.is_dir():
        checkpoint_files.check(path)
        state = whole_weights(path)
    else:
        state = checkpoint_files.read(path)["state_dict"]
    return {
        name.removeprefix(CHECKPOINT_PREFIX): tensor
        for name, tensor in state.items()
        if name.startswith(CHECKPOINT_PREFIX)
    }
