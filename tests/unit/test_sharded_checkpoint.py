"""Checkpoints of a sharded policy, in one process."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict import get_model_state_dict

from app.policy.model import Policy
from app.policy.sharding import Sharding
from app.runs.checkpoint_files import DamagedCheckpointError, check, seal
from app.runs.sharded_checkpoint import read_sharded, write_sharded
from datamodules.errors import UserError

POLICY = Policy("configs/tiny_policy")


@pytest.fixture
def one_process(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("one_process")
def test_weights_are_restored_and_an_unsharded_policy_is_refused(tmp_path: Path):
    sharding = Sharding(torch.device("cpu"), shard_size=1)
    saved, fresh = sharding.load(POLICY), sharding.load(POLICY)
    with torch.no_grad():
        for parameter in saved.parameters():
            parameter.add_(1.0)
    # Copies, one for each name of a tied tensor, as Lightning makes them of weights on a GPU.
    copies = {name: tensor.clone() for name, tensor in get_model_state_dict(saved).items()}
    write_sharded({"state_dict": copies, "epoch": 3}, tmp_path / "parts", saved)
    assert read_sharded(tmp_path / "parts", fresh, [])["epoch"] == 3
    for name, parameter in saved.named_parameters():
        assert torch.equal(parameter.full_tensor(), fresh.get_parameter(name).full_tensor()), name
    # Without the check nothing would be read, and the run would continue with other weights.
    with pytest.raises(UserError, match=r"as it is sharded here, does not have\. Resume with the same policy"):
        read_sharded(tmp_path / "parts", POLICY.load(), [])


def test_a_shard_that_is_missing_or_new_is_damage(tmp_path: Path) -> None:
    folder = tmp_path / "step_00000001.ckpt"
    folder.mkdir()
    names = ("run.ckpt", "shard-00001.safetensors", "shard-00002.safetensors")
    for name in names:
        (folder / name).write_text(name)
    seal(folder)
    check(folder)
    for name in names:
        (folder / name).rename(tmp_path / name)
        with pytest.raises(DamagedCheckpointError, match=f"is damaged: step_00000001.ckpt/{name} is missing"):
            check(folder)
        (tmp_path / name).rename(folder / name)
    (folder / "shard-00003.safetensors").write_text("from elsewhere")
    with pytest.raises(DamagedCheckpointError, match=r"shard-00003\.safetensors .* differs from its checksum"):
        check(folder)
