"""AdamW in one kernel: the same steps, and checkpoints that go from one to the other."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses import FakeTensorMode

from app.update import optimization
from app.update.optimization import Optimization, can_fuse

OPTIONS = Optimization(learning_rate=0.01, weight_decay=0.1, schedule="constant_with_warmup", warmup_steps=3)


def model() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.Tanh(), torch.nn.Linear(7, 3))


def trained(*halves: bool) -> torch.Tensor:
    """Return the weights after three steps for each of `halves`, fused or not; the later ones are resumed."""
    found, saved, data = model(), None, torch.linspace(-1, 1, 40).view(8, 5)
    for fused in halves:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(optimization, "can_fuse", lambda trained, fused=fused: fused)  # a CPU has the kernel, too
            optimizer = OPTIONS.optimizer(found)
            scheduler = OPTIONS.scheduler(optimizer, 6)
            if saved is not None:
                optimizer.load_state_dict(saved[0])
                scheduler.load_state_dict(saved[1])
                OPTIONS.apply(optimizer, scheduler)
            for _ in range(3):
                optimizer.zero_grad()
                found(data).square().sum().backward()
                optimizer.step()
                scheduler.step()
        assert {group["fused"] for group in optimizer.param_groups} == {True if fused else None}
        saved = optimizer.state_dict(), scheduler.state_dict()
    return torch.cat([one.detach().flatten() for one in found.parameters()])


def test_fused_steps_are_the_same_also_after_a_resume_on_another_device() -> None:
    plain = trained(False, False)
    assert (plain - trained(False)).abs().max() > 1e-3
    for halves in ((True, True), (True, False), (False, True)):
        torch.testing.assert_close(trained(*halves), plain, rtol=1e-5, atol=1e-6)


def test_cuda_alone_is_fused_and_counts_its_steps_there() -> None:
    """On fake tensors: a run that was trained on a CPU is resumed on a GPU, and the other way round."""
    assert not can_fuse(list(model().parameters()))
    for device, fused in (("cuda", True), ("cpu", None)):
        with FakeTensorMode():
            found = torch.nn.Module()
            found.matrix = torch.nn.Parameter(torch.empty(5, 7, device=device))
            found.vector = torch.nn.Parameter(torch.empty(5, device=device))
            optimizer = OPTIONS.optimizer(found)
            assert [group["fused"] for group in optimizer.param_groups] == [fused, fused]
            for group in optimizer.param_groups:
                group["fused"] = not fused  # as the checkpoint has it
            for parameter in found.parameters():
                optimizer.state[parameter] = {"step": torch.tensor(3.0, device="cpu" if fused else "cuda")}
            OPTIONS.apply(optimizer, OPTIONS.scheduler(optimizer, 6))
        assert [group["fused"] for group in optimizer.param_groups] == [fused, fused]
        assert {state["step"].device.type for state in optimizer.state.values()} == {device}
