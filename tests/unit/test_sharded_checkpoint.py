"""Checkpoints of a sharded policy, in one process."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict import get_model_state_dict, get_optimizer_state_dict

from app.policy.model import Policy
from app.policy.sharding import Sharding
from app.runs.checkpoint_files import DamagedCheckpointError, check, seal
from app.runs.sharded_checkpoint import read_sharded, write_sharded
from app.update import optimization
from app.update.optimization import Optimization
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


@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize(("before", "after"), [(True, False), (False, True)])
def test_adamw_of_shards_is_resumed_fused_or_not(
    before: bool, after: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fused is what a GPU's AdamW is (`can_fuse`); a CPU has that kernel too."""
    sharding, options = Sharding(torch.device("cpu"), shard_size=1), Optimization(learning_rate=0.01, weight_decay=0.1)

    def stepped(model: torch.nn.Module, fused: bool, parts: Path | None = None, steps: int = 2) -> torch.optim.AdamW:
        monkeypatch.setattr(optimization, "can_fuse", lambda trained: fused)
        optimizer = options.optimizer(model)
        scheduler = options.scheduler(optimizer, None)
        if parts is not None:
            read_sharded(parts, model, [optimizer])
            options.apply(optimizer, scheduler)
        assert {group["fused"] for group in optimizer.param_groups} == {fused or None}
        for _ in range(steps):
            for parameter in model.parameters():
                parameter.grad = parameter.detach() / 3
            optimizer.step()
        return optimizer

    expected, saved, resumed = (sharding.load(POLICY) for _ in range(3))
    stepped(expected, False, steps=4)
    states = [get_optimizer_state_dict(saved, stepped(saved, before))]
    write_sharded({"state_dict": get_model_state_dict(saved), "optimizer_states": states}, tmp_path / "parts", saved)
    stepped(resumed, after, tmp_path / "parts")
    for name, parameter in expected.named_parameters():
        found = resumed.get_parameter(name).full_tensor()
        torch.testing.assert_close(found, parameter.full_tensor(), rtol=1e-5, atol=1e-6, msg=name)
        assert not torch.equal(found, saved.get_parameter(name).full_tensor())


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
