"""The policy's weights: under the names that an engine expects, from a checkpoint, and as a Hugging Face folder."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from safetensors import SafetensorError
from torch.distributed.tensor import DTensor
from transformers import GenerationConfig, PreTrainedTokenizerBase
from transformers.utils import GENERATION_CONFIG_NAME

from app.policy.adapters import adapted_weight, causal_lm, is_adapted, peft_model
from app.policy.model import tied_weight_names
from app.runs import checkpoint_files
from app.runs.sharded_checkpoint import whole_weights
from datamodules.errors import UserError

CHECKPOINT_PREFIX = "policy_model."
"""Prefix of the policy's tensors in a checkpoint."""


def plain_weights(model: torch.nn.Module, changing: bool = False) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield names and tensors of the architecture without adapters, as an engine expects them.

    Adapted tensors are sums of the weights and their adapters; the policy itself is never merged, because taking the
    adapters out again would leave the error of rounding in its weights. A head tied to the embedding is left out, as in
    the model's own file. The tensors of a sharded policy are gathered one at a time: all ranks must iterate to the end
    together.

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
    weights = lm.state_dict()
    blocks = {_block(name) for name in weights if ".base_layer" in name}
    for name, tensor in weights.items():
        if "lora_" not in name and name not in tied and (_block(name) in blocks or not changing):
            layer, base, part = name.partition(".base_layer.")
            if part == "weight":
                tensor = adapted_weight(lm.get_submodule(layer)).detach()
            yield (f"{layer}.{part}" if base else name), _gathered(tensor)


def _gathered(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _block(name: str) -> str:
    """Return the block of a weight: `model.layers.0.mlp` for `model.layers.0.mlp.up_proj.weight`."""
    return name.replace(".base_layer", "").rpartition(".")[0].rpartition(".")[0]


def count_parameters(model: torch.nn.Module) -> tuple[int, int]:
    """Return the number of all parameters and of the trainable ones."""
    sizes = [(parameter.numel(), parameter.requires_grad) for parameter in model.parameters()]
    return sum(size for size, _ in sizes), sum(size for size, trained in sizes if trained)


def export(
    model: torch.nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    dtype: torch.dtype,
    *,
    adapter_only: bool = False,
) -> None:
    """Write a Hugging Face folder that `from_pretrained` loads, with adapters merged into the weights.

    The folder appears when all of it is written, and nothing is left if that fails. The model cannot be used
    afterwards: it has the dtype of the folder, and peft unloads adapters.

    Args:
        model: the policy.
        tokenizer: the policy's tokenizer.
        folder: does not exist or is empty.
        dtype: of the weights in the folder.
        adapter_only: write only the adapters, which `peft.PeftModel.from_pretrained` adds to the initial weights.

    Raises:
        UserError: the disk is full, or the policy has no adapters to write.
    """
    adapted, lm = peft_model(model), causal_lm(model)
    if adapter_only and adapted is None:
        raise UserError("--adapter: the policy has no adapters, all its weights were trained. Drop --adapter.")
    if adapted is not None and not adapter_only:
        for parameter in lm.parameters():
            parameter.data = parameter.data.to(torch.promote_types(parameter.dtype, torch.float32))
        lm = adapted.merge_and_unload()
    for parameter in lm.parameters():
        parameter.data = parameter.data.to(dtype)
    # save_pretrained refuses settings that contradict each other (a temperature without sampling), which
    # from_pretrained accepts, so they are written as they were read.
    generation, lm.generation_config = lm.generation_config, GenerationConfig()
    folder = folder.absolute()
    place = next(parent for parent in folder.parents if parent.exists())
    with TemporaryDirectory(prefix=f".{folder.name}.", dir=place) as temporary:
        written = Path(temporary) / "policy"
        try:
            (adapted if adapted is not None and adapter_only else lm).save_pretrained(str(written))
        except SafetensorError as error:
            raise UserError(f"{folder} cannot be written ({error}). Free disk space or give another folder") from error
        if generation is not None and not adapter_only:
            generation.to_json_file(written / GENERATION_CONFIG_NAME, keys_to_pop=["compile_config"])
        tokenizer.save_pretrained(written)
        folder.parent.mkdir(parents=True, exist_ok=True)
        written.replace(folder)


def checkpoint_weights(path: Path) -> dict[str, torch.Tensor]:
    """Return the policy's tensors from a checkpoint, a file or a folder. Raises UserError if Dots did not write it."""
    if path.is_dir():
        checkpoint_files.check(path)
        state = whole_weights(path)
    else:
        state = checkpoint_files.read(path)["state_dict"]
    prefix = CHECKPOINT_PREFIX
    return {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}
