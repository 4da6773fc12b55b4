"""Sketches and `selectors.Aligned` in real trainings: what they hold, cost and restore."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch

from app.cli.entry import main
from callbacks import RolloutReplay
from callbacks.stages import Stage, StepCallback
from datamodules.selectors import Aligned, Selector, Uniform
from datamodules.types import GroupSketch, RolloutGroup
from tests.support.command import ROOT
from tests.support.scripted_run import HALF, QUARTER, WRONG, scripted_run


class Gradients(StepCallback):
    """Asks for sketches and takes the gradient of each group itself, before the update.

    Attributes:
        wants: whether it asks.
        whole: gradients of all weights and of the head alone, by step.
        sketches: of each step.
    """

    stage = Stage.WATCH
    latest: ClassVar[Gradients]

    def __init__(self, wants: bool = True) -> None:
        type(self).latest = self
        self.wants = wants
        self.whole: list[tuple[torch.Tensor, torch.Tensor]] = []
        self.sketches: list[list[GroupSketch]] = []
        self.groups: list[list[RolloutGroup]] = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        batch.wants_sketches = self.wants
        learner = pl_module.learner
        parts = learner.minibatches_of(batch.groups, learner.advantages_of(batch.groups), batch.step)
        sequences = [one for part in parts for one in part.sequences]
        found, head = [], pl_module.policy_model.get_output_embeddings()
        kept = head.weight
        # Tied to the input embedding: as a weight of its own the head has a gradient of its own.
        head.weight = torch.nn.Parameter(kept.detach().clone())
        try:
            for index in range(len(batch.groups)):
                pl_module.policy_model.zero_grad(set_to_none=True)
                for packed in learner.microbatches.of([one for one in sequences if one.group == index]):
                    learner.loss_of(packed).loss.backward()
                rest = [one.grad for one in learner.trained if one is not head.weight]
                own = torch.zeros_like(kept) if head.weight.grad is None else head.weight.grad
                whole = [torch.zeros_like(p) if g is None else g for p, g in
                         zip([p for p in learner.trained if p is not head.weight], rest, strict=True)]  # fmt: skip
                found.append((torch.cat([own.flatten(), *(one.flatten() for one in whole)]), own.flatten()))
        finally:
            head.weight = kept
            pl_module.policy_model.zero_grad(set_to_none=True)
        self.whole.append((torch.stack([one for one, _ in found]), torch.stack([one for _, one in found])))

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        self.sketches.append(batch.sketches)
        self.groups.append(batch.groups)


def ranks_of(values: torch.Tensor) -> np.ndarray:
    return values.numpy().argsort().argsort()


def spearman(one: torch.Tensor, other: torch.Tensor) -> float:
    return float(np.corrcoef(ranks_of(one), ranks_of(other))[0, 1])


def test_a_run_sketches_the_head_gradient_of_every_group(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    watch = Gradients()
    patterns = [[HALF, QUARTER, WRONG][i % 3] for i in range(24)]
    run = scripted_run(
        tmp_path, monkeypatch, patterns, [RolloutReplay(fresh_fraction=0.75, capacity=16), watch], steps=2,
        prompts_per_step=16, max_completion_length=12, selector=Uniform(),
    )  # fmt: skip
    assert len(run.steps) == 2
    for (whole, head), sketches, groups in zip(watch.whole, watch.sketches, watch.groups, strict=True):
        assert [one.group for one in sketches] == list(range(16))
        assert [one.prompt_id for one in sketches] == [group.prompt.id for group in groups]
        assert [(one.source, one.birth_step) for one in sketches] == [(g.source, g.birth_step) for g in groups]
        vectors = torch.from_numpy(np.stack([one.vector for one in sketches]))
        assert vectors.dtype == torch.float32
        assert vectors[0].nbytes <= 4096
        silent = torch.tensor([not group.informative for group in groups])
        assert (vectors[silent] == 0).all()
        assert silent.any()
        taught = vectors[~silent]
        maps = run.module.learner.sketch_sums(1).projection
        shape = (-1, *run.module.policy_model.get_output_embeddings().weight.shape)
        expected = maps.fold(maps.vocabulary.T.float() @ -head[~silent].view(shape) @ maps.hidden.float())
        torch.testing.assert_close(taught, expected, rtol=1e-3, atol=1e-6)
        upper = torch.triu_indices(len(taught), len(taught), 1)
        products = [(one @ one.T)[upper[0], upper[1]] for one in (taught, head[~silent], whole[~silent])]
        agreement = [spearman(products[0], one) for one in products[1:]]
        # Rewards at random leave the gradients of all weights little in common; on real ones see docs/selectors.md.
        print(f"rank agreement with the head's gradients {agreement[0]:.2f}, with all gradients {agreement[1]:.2f}")
        assert agreement[0] > 0.9
    assert any(one.source == "replay" for one in watch.sketches[1])


def test_nothing_is_sketched_where_nothing_asks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    watch = Gradients(wants=False)
    scripted_run(tmp_path, monkeypatch, [HALF] * 8, [watch], steps=1, selector=Uniform())
    assert watch.sketches == [[]]


def test_aligned_learns_from_the_updates_of_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    selector: Selector = Aligned(use_embeddings=False)
    watch = Gradients(wants=False)
    run = scripted_run(
        tmp_path, monkeypatch, [HALF, WRONG] * 8, [watch], steps=3, prompts_per_step=8, selector=selector,
    )  # fmt: skip
    taught = [one.prompt.id for groups in watch.groups for one in groups if one.informative]
    state = selector.state_dict()["gradients"]
    assert [run.data.pools["train"].ids[position] for position in state["positions"]] == taught
    assert state["units"].norm(dim=1) == pytest.approx(np.ones(len(taught)), abs=1e-5)
    assert all("selection/pool_share" in step.metrics for step in run.steps)


@pytest.mark.long
@pytest.mark.timeout(400)
def test_rank_agreement_on_prompts_that_mostly_teach(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Inner products, and sums of cosines with all groups, against those of whole gradients. Found: 0.87 and 0.83."""
    monkeypatch.setattr("sys.argv", ["dots"])
    main(
        [
            "fit", "--config", str(ROOT / "configs" / "quickstart.yaml"),
            "--config", str(ROOT / "configs" / "settings" / "mostly_teachable.yaml"), "--data.selector=Uniform",
            "--trainer.callbacks", "[{class_path: tests.integration.test_sketches_fit.Gradients}]",
            "--trainer.max_steps=1", "--model.mini_batches=1", "--data.prompts_per_step=96",
            "--trainer.limit_val_batches=0", f"--trainer.logger.init_args.save_dir={tmp_path}",
        ]
    )  # fmt: skip
    [(whole, _)], [sketches] = Gradients.latest.whole, Gradients.latest.sketches
    vectors = torch.from_numpy(np.stack([one.vector for one in sketches]))
    taught = vectors.norm(dim=1) > 0
    upper = torch.triu_indices(int(taught.sum()), int(taught.sum()), 1)
    products = [(one[taught] @ one[taught].T)[upper[0], upper[1]] for one in (vectors, whole)]
    units = [one[taught] / one[taught].norm(dim=1, keepdim=True) for one in (vectors, whole)]
    aligned = [(one @ one.sum(0)) for one in units]
    found = spearman(*products), spearman(*aligned)
    print(f"{int(taught.sum())} groups: rank agreement of inner products {found[0]:.2f}, of alignment {found[1]:.2f}")
    assert found[0] > 0.75
    assert found[1] > 0.6
