"""Bytes that one process of a run holds of a policy's parameters, gradients and optimizer state; printed as JSON.

Run as a process of its own: `RANK=0 WORLD_SIZE=1 ... python -m tests.support.sharded_memory CONFIG_FOLDER`.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from app.policy.sharding import Sharding, own_part
from app.update.optimization import Optimization


def held(tensors: Iterable[Tensor]) -> int:
    """Bytes of the memory behind what this process holds of them, counted once."""
    storages = {(part := own_part(one)).untyped_storage()._cdata: part.untyped_storage().nbytes() for one in tensors}
    return sum(storages.values())


def main(folder: str) -> None:
    dist.init_process_group("gloo")
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder)).train()
    Sharding(torch.device("cpu"), dist.get_world_size()).shard(model)
    optimizer = Optimization().optimizer(model)
    model(input_ids=torch.arange(8)[None]).logits.float().logsumexp(-1).mean().backward()
    optimizer.step()
    parameters = list(model.parameters())
    state = [one for values in optimizer.state.values() for one in values.values() if isinstance(one, Tensor)]
    # A process whose part is whole shows here: nothing was left behind by the passes.
    kinds = {"parameters": parameters, "gradients": [one.grad for one in parameters if one.grad is not None]}
    print(json.dumps({name: held(one) for name, one in (kinds | {"optimizer": state}).items()}))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
