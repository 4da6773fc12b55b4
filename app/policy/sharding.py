"""The policy cut over the processes of a run: FSDP2, one unit per decoder layer and one for the rest.

Of parameters, gradients and optimizer state every process holds its share. A layer's weights are whole only while that
layer works; embedding, head and last norm stay whole from the forward to the end of the backward pass.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
)
from torch.distributed.tensor import DTensor

from app.policy.compilation import compile_layers
from app.policy.model import Policy, causal_lm, decoder_layers
from app.policy.scoring import register_logprobs_forward


@dataclass(frozen=True)
class Sharding:
    """How the policy is cut, and where its parts are.

    Attributes:
        device: of this process's part.
        shard_size: processes that hold one copy together; with fewer than all of them, copies are kept equal by an
            all-reduce (hybrid sharding).
        precision: dtypes of computation and of the reduction of gradients; the parts themselves keep the policy's.
        offload: whether the parts live in host memory while they are not used.
        reshard_after_forward: free a layer's whole weights after its forward pass, and gather them again for backward.
    """

    device: torch.device
    shard_size: int
    precision: MixedPrecisionPolicy = field(default_factory=MixedPrecisionPolicy)
    offload: bool = False
    reshard_after_forward: bool = True

    def load(self, policy: Policy, *, compiles: bool = False) -> torch.nn.Module:
        """The policy, cut. Collective: rank 0 reads its files, the others get their parts from it.

        Args:
            policy: which model.
            compiles: `compile_layers` before cutting.
        """
        loaded = policy.load() if dist.get_rank() == 0 else None
        model = policy.on_meta()
        if compiles:
            compile_layers(model)
        self.shard(model)
        _materialize(model, torch.device("cpu") if self.offload else self.device)
        weights = loaded.state_dict() if loaded is not None else {}
        set_model_state_dict(
            model, weights, options=StateDictOptions(full_state_dict=True, broadcast_from_rank0=True, strict=True)
        )
        _broadcast_buffers(model, loaded, self.device)
        return model

    def shard(self, model: torch.nn.Module) -> None:
        """Cuts a model in place; its parameters may be on the meta device."""
        lm: Any = causal_lm(model)
        options: dict[str, Any] = {
            "mesh": self._mesh(),
            "mp_policy": self.precision,
            "offload_policy": CPUOffloadPolicy() if self.offload else OffloadPolicy(),
        }
        for layer in decoder_layers(model):
            fully_shard(layer, reshard_after_forward=self.reshard_after_forward, **options)
        fully_shard(lm, **options)
        for unit in units(lm):
            # A sum, not a mean: a token's weight is already that of the global mini-batch (see `gradient_sum`).
            unit.set_gradient_divide_factor(1.0)
            unit.set_force_sum_reduction_for_comms(True)
        register_logprobs_forward(lm)

    @contextmanager
    def whole(self, model: torch.nn.Module) -> Iterator[None]:
        """All weights whole on every process while inside, gathered once. Collective.

        For generation, which passes over the weights for every token.
        """
        found = units(model)
        for unit in found:
            unit.set_reshard_after_forward(False, recurse=False)
            unit.unshard()
        try:
            yield
        finally:
            for unit in found:
                unit.reshard()
                unit.set_reshard_after_forward(self.reshard_after_forward and unit is not found[0], recurse=False)

    def _mesh(self) -> DeviceMesh:
        ranks = dist.get_world_size()
        if self.shard_size == ranks:
            return init_device_mesh(self.device.type, (ranks,), mesh_dim_names=("shard",))
        sizes = (ranks // self.shard_size, self.shard_size)
        return init_device_mesh(self.device.type, sizes, mesh_dim_names=("replicate", "shard"))


def units(model: torch.nn.Module) -> Sequence[FSDPModule]:
    """The units that the model's weights are gathered by, the root first; none where it is not cut."""
    return [module for module in model.modules() if isinstance(module, FSDPModule)]


def is_sharded(model: torch.nn.Module) -> bool:
    """Whether its parameters are cut over processes."""
    return bool(units(model))


def _materialize(model: torch.nn.Module, device: torch.device) -> None:
    """Gives memory to what is on the meta device; values are to follow."""
    model.to_empty(device=device)
    # Memory was given to each name by itself: names that share a parameter must share it again.
    causal_lm(model).tie_weights()


def _broadcast_buffers(model: torch.nn.Module, loaded: torch.nn.Module | None, device: torch.device) -> None:
    """Buffers (rotary frequencies) as rank 0 has computed them."""
    values = dict(loaded.named_buffers()) if loaded is not None else {}
    for name, buffer in model.named_buffers():
        value = values[name].to(device) if loaded is not None else torch.empty_like(buffer, device=device)
        dist.broadcast(value, 0)
        buffer.data = value.to(buffer.dtype)


def own_part(tensor: torch.Tensor) -> torch.Tensor:
    """What this process holds of a tensor that may be cut."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
