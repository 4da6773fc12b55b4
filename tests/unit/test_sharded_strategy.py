"""What the sharded strategy does otherwise than Lightning's, on devices that this machine may not have."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, distribute_tensor
from torch.testing._internal.distributed.fake_pg import FakeStore

from app.policy.sharding import Sharding
from app.runs.sharded_checkpoint import tied_names
from app.runs.sharded_strategy import ShardedStrategy
from tests.support.policies import module_on, tiny_model


class OnMeta(ShardedStrategy):
    """Trains on the meta device, which every machine has beside the CPU."""

    root_device = torch.device("meta")


@pytest.fixture
def ranks() -> Iterator[None]:
    dist.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
    yield
    dist.destroy_process_group()


def test_shards_on_the_host_stay_there_and_others_are_moved(ranks: None) -> None:
    mesh = init_device_mesh("cpu", (2,))
    for sharded, device in ((True, "cpu"), (False, "meta")):
        model = torch.nn.Linear(2, 2, bias=False)
        if sharded:
            model.weight = torch.nn.Parameter(distribute_tensor(model.weight.detach(), mesh, [Replicate()]))
        strategy = OnMeta()
        strategy.model = model
        strategy.model_to_device()
        assert model.weight.device.type == device


def test_names_of_one_parameter() -> None:
    model = torch.nn.ModuleDict({name: torch.nn.Linear(2, 2, bias=name == "a") for name in "abc"})
    model["c"].weight = model["a"].weight
    assert tied_names(model) == {"c.weight": "a.weight"}


def test_tensors_on_the_host_can_be_reduced_beside_nccl(monkeypatch: pytest.MonkeyPatch) -> None:
    # NCCL alone has no sum for the gradients of shards that `cpu_offload` keeps on the host.
    assert ShardedStrategy().process_group_backend is None  # gloo, where there is no GPU
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert ShardedStrategy().process_group_backend == "cpu:gloo,cuda:nccl"
    assert ShardedStrategy(process_group_backend="gloo").process_group_backend == "gloo"


def test_inputs_are_made_where_shards_are_gathered() -> None:
    """The policy's own device is that of its shards, which `cpu_offload` keeps on the host."""
    module = module_on(tiny_model(8, seed=0))
    assert module.learner.device.type == "cpu"
    module.sharding = Sharding(torch.device("cuda", 3), shard_size=1, offload=True)
    assert module.learner.device == torch.device("cuda", 3)
