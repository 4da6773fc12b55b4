"""The policy sharded over the ranks of a run with FSDP2: one unit per decoder layer and one for the rest.

Every rank holds its shard of parameters, gradients and optimizer state. A layer's weights are gathered only while that
layer runs; embedding, head and last norm stay gathered from the forward to the end of the backward pass.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor

from app.policy.adapters import causal_lm
from app.policy.compilation import compile_layers
from app.policy.model import Policy, decoder_layers
from app.policy.scoring import register_logprobs_forward


@dataclass(frozen=True)
class Sharding:
    """How the policy is sharded, and where the shards live.

    Attributes:
        device: device of this rank's shards.
        shard_size: ranks that hold one copy together; if fewer than all, an all-reduce keeps the copies equal (hybrid
            sharding).
        precision: dtypes of computation and of gradient reduction; the shards keep the policy's dtype.
        offload: keep the shards in host memory while they are not in use.
        reshard_after_forward: free a layer's gathered weights after its forward pass and gather them again for the
            backward pass.
    """

    device: torch.device
    shard_size: int
    precision: MixedPrecisionPolicy = field(default_factory=MixedPrecisionPolicy)
    offload: bool = False
    reshard_after_forward: bool = True

    def load(self, policy: Policy, *, compiles: bool = False) -> torch.nn.Module:
        """Load and shard a policy, and on request apply `compile_layers` before.

        Collective: rank 0 reads the files and sends the other ranks their shards.
        """
        loaded = policy.load() if dist.get_rank() == 0 else None
        model = policy.on_meta()
        if compiles:
            compile_layers(model)
        self.shard(model)
        model.to_empty(device=torch.device("cpu") if self.offload else self.device)
        # Every name was given memory of its own: names that share a parameter must share it again.
        causal_lm(model).tie_weights()
        weights = loaded.state_dict() if loaded is not None else {}
        set_model_state_dict(
            model, weights, options=StateDictOptions(full_state_dict=True, broadcast_from_rank0=True, strict=True)
        )
        # Buffers (rotary frequencies) are computed, not loaded: all ranks take the values of rank 0.
        values = dict(loaded.named_buffers()) if loaded is not None else {}
        for name, buffer in model.named_buffers():
            value = values[name].to(self.device) if loaded is not None else torch.empty_like(buffer, device=self.device)
            dist.broadcast(value, 0)
            buffer.data = value.to(buffer.dtype)
        return model

    def shard(self, model: torch.nn.Module) -> None:
        """Shard a model in place; its parameters may be on the meta device."""
        lm = causal_lm(model)
        ranks, device = dist.get_world_size(), self.device.type
        hybrid = self.shard_size != ranks
        sizes = (ranks // self.shard_size, self.shard_size) if hybrid else (ranks,)
        mesh = init_device_mesh(device, sizes, mesh_dim_names=("replicate", "shard") if hybrid else ("shard",))
        options: dict[str, Any] = {
            "mesh": mesh,
            "mp_policy": self.precision,
            "offload_policy": CPUOffloadPolicy() if self.offload else OffloadPolicy(),
        }
        for layer in decoder_layers(model):
            fully_shard(layer, reshard_after_forward=self.reshard_after_forward, **options)
        fully_shard(lm, **options)
        for unit in units(lm):
            # A sum, not a mean: the loss already weights tokens by the global mini-batch (see `gradient_sum`).
            unit.set_gradient_divide_factor(1.0)
            unit.set_force_sum_reduction_for_comms(True)
        register_logprobs_forward(lm)

    @contextmanager
    def whole(self, model: torch.nn.Module) -> Iterator[None]:
        """Gather all weights on every rank for the duration of the context, for generation. Collective."""
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


def units(model: torch.nn.Module) -> Sequence[FSDPModule]:
    """Return the FSDP units of a model, the root first; empty if it is not sharded."""
    return [module for module in model.modules() if isinstance(module, FSDPModule)]


def own_part(tensor: torch.Tensor) -> torch.Tensor:
    """Return this rank's shard of a tensor, or the tensor itself if it is not sharded."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
