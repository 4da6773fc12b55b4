"""A checkpoint as a folder: every process writes its parts of the tensors, in safetensors; rank 0 the rest.

The parts say where they belong, so that any number of processes can read them. No file needs a pickle to be read.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.tensor import DTensor

from datamodules.errors import UserError

REST = "run.ckpt"
"""What is not cut: loops, callbacks, selector, replay buffer, and the optimizer's plain values."""
_MODEL, _OPTIMIZERS = "state_dict", "optimizer_states"
_TIED = "tied_weights"


def write_sharded(checkpoint: Mapping[str, Any], folder: Path) -> None:
    """Writes a checkpoint of Lightning whose tensors are cut. Collective.

    Args:
        checkpoint: as Lightning dumps it, with the states of model and optimizers by parameter name.
        folder: where to; made if it is not there.
    """
    folder.mkdir(parents=True, exist_ok=True)
    parts, rest = _apart(checkpoint)
    dcp.save(parts, storage_writer=HuggingFaceStorageWriter(path=str(folder), save_distributed=True))
    if dist.get_rank() == 0:
        torch.save(rest, folder / REST)


def read_sharded(folder: Path, model: torch.nn.Module, optimizers: Sequence[torch.optim.Optimizer]) -> dict[str, Any]:
    """Gives a model and its optimizers the state in a folder. Collective.

    Args:
        folder: of `write_sharded`, by any number of processes.
        model: cut over the processes of now.
        optimizers: of it; none where only the weights are wanted.

    Returns:
        What else the checkpoint holds.

    Raises:
        UserError: it is no such folder, or is of another policy.
    """
    rest = read_rest(folder)
    rest.pop(_TIED)
    weights = get_model_state_dict(model)
    states = [get_optimizer_state_dict(model, one) for one in optimizers]
    parts, _ = _apart({_MODEL: weights, _OPTIMIZERS: states})
    _check_same(folder, parts)
    # In place: the parts are the tensors of model and optimizers.
    dcp.load(parts, storage_reader=HuggingFaceStorageReader(str(folder)))
    set_model_state_dict(model, weights | rest.pop(_MODEL))
    for optimizer, state, plain in zip(optimizers, states, rest.pop(_OPTIMIZERS), strict=False):
        for name, values in plain["state"].items():
            state["state"][name] |= values
        set_optimizer_state_dict(model, optimizer, {"state": state["state"], "param_groups": plain["param_groups"]})
    return rest


def read_rest(folder: Path) -> dict[str, Any]:
    """What is not cut. Raises UserError where the folder is no checkpoint."""
    try:
        return torch.load(folder / REST, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, UnpicklingError, EOFError) as error:
        raise UserError(
            f"--ckpt_path {folder}: cannot be read as a checkpoint ({type(error).__name__}); a sharded one is a folder "
            f"with {REST} and safetensors files"
        ) from error


def whole_weights(folder: Path) -> dict[str, torch.Tensor]:
    """The model's tensors in a folder, whole, in one process and without a model."""
    prefix = f"{_MODEL}/"
    sizes = {name: one for name, one in _stored(folder).items() if name.startswith(prefix)}
    tensors = {name: torch.empty(one.size, dtype=one.properties.dtype) for name, one in sizes.items()}
    dcp.load(tensors, storage_reader=HuggingFaceStorageReader(str(folder)), no_dist=True)
    weights = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
    rest = read_rest(folder)
    return weights | rest[_MODEL] | {alias: weights[name] for alias, name in rest[_TIED].items()}


def _apart(checkpoint: Mapping[str, Any]) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """The tensors that are cut, by name, and the checkpoint without them."""
    tied = _tied(checkpoint[_MODEL])
    parts = {f"{_MODEL}/{name}": tensor for name, tensor in checkpoint[_MODEL].items() if name not in tied}
    plain: list[dict[str, Any]] = []
    states = checkpoint.get(_OPTIMIZERS, [])
    for number, state in enumerate(states):
        values = state["state"]
        parts |= {f"{_OPTIMIZERS}/{number}/{name}/{key}": one for name in values for key, one in values[name].items()}
        kept = {name: {key: one for key, one in values[name].items() if not _is_cut(one)} for name in values}
        plain.append({"state": kept, "param_groups": state["param_groups"]})
    weights = {name: tensor for name, tensor in checkpoint[_MODEL].items() if not _is_cut(tensor)}
    cut = {name: tensor for name, tensor in parts.items() if _is_cut(tensor)}
    return cut, dict(checkpoint) | {_MODEL: weights, _OPTIMIZERS: plain, _TIED: tied}


def _tied(weights: Mapping[str, torch.Tensor]) -> dict[str, str]:
    """Second names of tensors that have two (a tied head), each with the first."""
    first: dict[int, str] = {}
    tied = {}
    for name, tensor in weights.items():
        if isinstance(tensor, DTensor):
            known = first.setdefault(tensor.to_local().untyped_storage()._cdata, name)
            if known != name:
                tied[name] = known
    return tied


def _is_cut(value: object) -> bool:
    return isinstance(value, DTensor)


def _check_same(folder: Path, parts: Mapping[str, torch.Tensor]) -> None:
    found = _stored(folder)
    if unread := sorted(name for name in found if name.startswith(f"{_MODEL}/") and name not in parts):
        raise UserError(
            f"--ckpt_path {folder}: {len(unread)} tensors there ({unread[0]}) have no place in model.policy as it is "
            "cut here: expected a checkpoint of the same policy, and callbacks.ShardedPolicy"
        )
    for name, part in parts.items():
        there = tuple(found[name].size) if name in found else None
        if there != tuple(part.shape):
            raise UserError(
                f"--ckpt_path {folder}: {name} has the shape {there} there and {tuple(part.shape)} in model.policy: "
                "expected a checkpoint of the same policy and optimizer"
            )


def _stored(folder: Path) -> dict[str, Any]:
    """Sizes and dtypes of the tensors in a folder, by name."""
    return HuggingFaceStorageReader(str(folder)).read_metadata().state_dict_metadata
