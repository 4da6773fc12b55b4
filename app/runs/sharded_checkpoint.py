"""Checkpoints as folders: every rank writes its shards of the tensors in safetensors, rank 0 writes the rest.

The shards record their place in the whole tensor, so that any number of ranks can read them. No file needs a pickle.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import Future
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

from app.runs.background import Background, copied
from datamodules.errors import UserError

REST = "run.ckpt"
"""File of everything that is not sharded: loops, callbacks, selector, replay buffer, the optimizer's plain values."""
_MODEL, _OPTIMIZERS = "state_dict", "optimizer_states"
_TIED = "tied_weights"


def write_sharded(
    checkpoint: Mapping[str, Any], folder: Path, model: torch.nn.Module, background: Background | None = None
) -> None:
    """Write a Lightning checkpoint with sharded states of model and optimizers, by parameter name. Collective.

    Args:
        checkpoint: the states, whose tensors may be copies of the model's (Lightning's are, on a GPU).
        folder: where to; made if it is missing.
        model: the sharded model.
        background: writes copies of the states; by default the caller waits.
    """
    folder.mkdir(parents=True, exist_ok=True)
    shards, rest = _split(checkpoint, tied_names(model))
    writer = HuggingFaceStorageWriter(path=str(folder), save_distributed=True)
    first = dist.get_rank() == 0
    if background is None:
        dcp.save(shards, storage_writer=writer)
        if first:
            torch.save(rest, folder / REST)
        return
    written = dcp.async_save(shards, storage_writer=writer, process_group=background.group())
    assert isinstance(written, Future)
    background.submit(written.result)
    if first:
        copy = copied(rest)
        background.submit(lambda: torch.save(copy, folder / REST))


def read_sharded(folder: Path, model: torch.nn.Module, optimizers: Sequence[torch.optim.Optimizer]) -> dict[str, Any]:
    """Load the state of a sharded model and its optimizers, and return the rest of the checkpoint. Collective.

    Args:
        folder: written by `write_sharded` with any number of ranks.
        model: sharded over the current ranks.
        optimizers: the model's optimizers; empty when only the weights are wanted.

    Raises:
        UserError: the folder is not a checkpoint, or belongs to another policy.
    """
    rest = read_rest(folder)
    rest.pop(_TIED)
    weights = get_model_state_dict(model)
    states = [get_optimizer_state_dict(model, one) for one in optimizers]
    shards, _ = _split({_MODEL: weights, _OPTIMIZERS: states}, tied_names(model))
    _check_same(folder, shards)
    # Loads in place: the shards are the tensors of the model and the optimizers.
    dcp.load(shards, storage_reader=HuggingFaceStorageReader(str(folder)))
    set_model_state_dict(model, weights | rest.pop(_MODEL))
    for optimizer, state, plain in zip(optimizers, states, rest.pop(_OPTIMIZERS), strict=False):
        for name, values in plain["state"].items():
            state["state"][name] |= values
        set_optimizer_state_dict(model, optimizer, {"state": state["state"], "param_groups": plain["param_groups"]})
    return rest


def read_rest(folder: Path) -> dict[str, Any]:
    """Return what is not sharded. Raises UserError when the folder is not a checkpoint."""
    try:
        return torch.load(folder / REST, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, UnpicklingError, EOFError) as error:
        raise UserError(
            f"--ckpt_path {folder}: cannot be read as a checkpoint ({type(error).__name__}). Expected a file, or a "
            f"folder with {REST} and safetensors files; name another checkpoint"
        ) from error


def whole_weights(folder: Path) -> dict[str, torch.Tensor]:
    """Return the model's tensors in a folder, gathered in this process. Needs no model and no process group."""
    prefix = f"{_MODEL}/"
    sizes = {name: one for name, one in _stored(folder).items() if name.startswith(prefix)}
    tensors = {name: torch.empty(one.size, dtype=one.properties.dtype) for name, one in sizes.items()}
    dcp.load(tensors, storage_reader=HuggingFaceStorageReader(str(folder)), no_dist=True)
    weights = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
    rest = read_rest(folder)
    return weights | rest[_MODEL] | {alias: weights[name] for alias, name in rest[_TIED].items()}


def tied_names(model: torch.nn.Module) -> dict[str, str]:
    """Return the further names of parameters that have several (a tied head), with the first name of each."""
    first: dict[int, str] = {}
    names = {name: id(one) for name, one in model.named_parameters(remove_duplicate=False)}
    return {name: known for name, one in names.items() if (known := first.setdefault(one, name)) != name}


def _split(checkpoint: Mapping[str, Any], aliases: Mapping[str, str]) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Return the sharded tensors by name, and the checkpoint without them. What has several names is stored once."""
    weights: dict[str, torch.Tensor] = checkpoint[_MODEL]
    tied = {name: known for name, known in aliases.items() if isinstance(weights.get(name), DTensor)}
    shards: dict[str, torch.Tensor] = {
        f"{_MODEL}/{name}": one for name, one in weights.items() if isinstance(one, DTensor) and name not in tied
    }
    plain = []
    for number, state in enumerate(checkpoint.get(_OPTIMIZERS, [])):
        kept: dict[str, dict[str, Any]] = {}
        for name, values in state["state"].items():
            kept[name] = {key: one for key, one in values.items() if not isinstance(one, DTensor)}
            shards |= {
                f"{_OPTIMIZERS}/{number}/{name}/{key}": one for key, one in values.items() if isinstance(one, DTensor)
            }
        plain.append({"state": kept, "param_groups": state["param_groups"]})
    whole = {name: tensor for name, tensor in weights.items() if not isinstance(tensor, DTensor)}
    return shards, dict(checkpoint) | {_MODEL: whole, _OPTIMIZERS: plain, _TIED: tied}


def _check_same(folder: Path, shards: Mapping[str, torch.Tensor]) -> None:
    found = _stored(folder)
    if unread := sorted(name for name in found if name.startswith(f"{_MODEL}/") and name not in shards):
        raise UserError(
            f"--ckpt_path {folder}: holds {len(unread)} tensors ({unread[0]}) that model.policy, as it is sharded "
            "here, does not have. Resume with the same policy and with callbacks.ShardedPolicy"
        )
    for name, shard in shards.items():
        there = tuple(found[name].size) if name in found else None
        if there != tuple(shard.shape):
            raise UserError(
                f"--ckpt_path {folder}: {name} has the shape {there} in the checkpoint and {tuple(shard.shape)} in "
                "model.policy. Resume with the same policy and optimizer"
            )


def _stored(folder: Path) -> dict[str, Any]:
    """Return sizes and dtypes of the tensors in a folder, by name."""
    return HuggingFaceStorageReader(str(folder)).read_metadata().state_dict_metadata
